"""Translates the variables that a bare ``srun`` sets into those by which torch's ranks find each other."""

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 12000, 20000  # below the ephemeral ports of the system


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return torch's variables for a task of ``srun``; empty in all other processes, including the batch script itself.

    MASTER_ADDR is the step's first node, where rank 0 runs. MASTER_PORT is derived from the job and step numbers.
    """
    if "SLURM_STEP_NUM_TASKS" not in environ or "SLURM_PROCID" not in environ:
        return {}
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]),
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(FIRST_PORT + (job + step) % PORTS),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list, such as gpu-a[001-004,007],login1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def tasks_per_node(tasks: str) -> list[int]:
    """Expand SLURM's list of tasks per node: 2(x3),1 is [2, 2, 2, 1]."""
    counts = []
    for part in tasks.split(","):
        count, _, repeated = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeated or 1)
    return counts
