"""Under a real SLURM: two nodes, preemption signals, requeues, killed ranks, other numbers of nodes; runs resume exactly."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT, launch, ranks
from tests.slurm import missing, slurm
from xar_scale.checkpoint.manifest import checkpoint_paths, newest_valid, step_of

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
STEPS = 200
SETTINGS = ["model.width=32", "model.heads=2", "train.global_batch=24", "train.log_every=1", "optim.warmup_steps=5"]
SETTINGS += [f"train.steps={STEPS}", "train.engine=fsdp2", "train.checkpoint_every=1000", "data.workers=1"]
SCRIPT = ROOT / "launchers" / "slurm.sbatch"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm") / "s") as running:
        yield running


def words(folder: Path, run: Path, *more: str) -> list[str]:
    return ["train", "--recipe", "digits", "--run-dir", str(run), f"data.path={folder / 'data'}", *SETTINGS, *more]


def curve(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # none is missing, none twice
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def undisturbed(folder):
    ended = launch(2, ["-m", "xar_scale", *words(folder, folder / "undisturbed")], folder / "logs")
    assert ended.codes == [0, 0], ended.text
    return curve(folder / "undisturbed")


class Job:
    """A job of launchers/slurm.sbatch and its output."""

    def __init__(self, here, folder: Path, name: str, *more: str, nodes: int = 2, tasks: int = 1, **environment: str) -> None:
        self.here, self.run, self.out = here, folder / name, folder / f"{name}.out"
        options = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--output={self.out}"]
        command = [*options, SCRIPT, *words(folder, self.run, *more)]
        self.number = here.submit(ROOT, *command, MASTER_ADDR="127.0.0.1", **environment)

    @property
    def said(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    def until(self, what, limit_s: float = 300) -> None:
        self.here.until(what, limit_s, lambda: self.said)

    def of_start(self, start: int) -> str:
        """The output of the ``start``-th start."""
        return self.said.partition(f", start {start}, ")[2].partition(", start ")[0]

    def steps(self, count: int) -> None:
        """Wait for this many steps of the newest start."""
        start = self.restarts() + 1
        self.until(lambda: self.of_start(start).count("\nstep ") >= count)

    def restarts(self) -> int:
        return int(self.here.state(self.number)["Restarts"])

    def ended(self, start: int) -> int:
        """The exit code of the ``start``-th start."""
        self.until(lambda: "ended with" in self.of_start(start))
        return int(re.findall(r"ended with (\d+)", self.of_start(start))[0])

    def ranks(self) -> dict[int, int]:
        """Process IDs by rank."""
        return ranks(self.run, "SLURM_PROCID", SLURM_STEP_NUM_TASKS="2")

    def rank(self, number: int) -> int:
        found = self.ranks()
        assert number in found, self.said
        return found[number]


def newest(run: Path) -> int:
    return step_of(checkpoint_paths(run)[-1])


def test_a_job_that_is_warned_requeued_killed_and_given_fewer_nodes_is_the_undisturbed_run(here, folder, undisturbed):
    job = Job(here, folder, "one")

    # the signal before the time limit
    job.steps(20)
    here.run("scancel", "--batch", "--signal=USR2", job.number)
    assert job.ended(1) == 75
    step = newest(job.run)
    assert f"xar-scale: stopped after step {step} of {STEPS} (SIGUSR2 to rank 0)" in job.said
    here.until(lambda: here.state(job.number)["JobState"] == "PENDING")
    assert here.state(job.number)["Restarts"] == "1"
    here.now(job.number)

    # requeued from outside
    job.steps(20)
    assert f"resumed from {job.run}/checkpoints/step-{step:08d} at step {step}" in job.said
    here.run("scontrol", "requeue", job.number)
    job.until(lambda: "(SIGTERM to rank" in job.said)
    here.now(job.number)

    # a killed rank
    job.steps(20)
    step = newest(job.run)
    assert f"resumed from {job.run}/checkpoints/step-{step:08d} at step {step}" in job.said
    begun = time.monotonic()
    os.kill(job.rank(1), signal.SIGKILL)
    code = job.ended(3)
    assert "rank 0 has lost another rank" in job.said and "Traceback" not in job.said
    assert code in (71, 137) and time.monotonic() - begun < 45
    job.until(lambda: f"exit code {code}; restart 1 since checkpoint step-{step:08d} (RESTARTS=3)" in job.said)
    here.until(lambda: here.state(job.number)["JobState"] == "PENDING")

    # only one node is available
    here.run("scancel", job.number)
    other = Job(here, folder, "one", nodes=1)
    other.until(lambda: "ended with 0" in other.said)
    here.until(lambda: here.state(other.number)["JobState"] == "COMPLETED")
    found = curve(job.run)
    assert len(found) == STEPS and newest_valid(job.run).manifest.world == 1
    assert {at: found[at] for at in range(1, step + 1)} == {at: undisturbed[at] for at in range(1, step + 1)}
    torch.testing.assert_close(torch.tensor([*found.values()]), torch.tensor([*undisturbed.values()]), rtol=1e-4, atol=0)
    assert not (job.run / "restarts").exists() and not list(ROOT.glob(".exit-*"))


@pytest.mark.long
def test_one_launcher_a_node_does_the_same(here, folder, undisturbed):
    job = Job(here, folder, "two", tasks=2, LAUNCH="torchrun", PROCESSES="1")  # tasks: as for LAUNCH=srun
    job.steps(20)
    here.run("scancel", "--batch", "--signal=USR2", job.number)
    assert job.ended(1) == 75
    here.now(job.number)
    job.steps(20)
    os.kill(ranks(job.run)[1], signal.SIGKILL)
    assert job.ended(2) not in (0, 75)
    here.now(job.number)
    assert job.ended(3) == 0
    assert curve(job.run) == undisturbed


@pytest.mark.long
def test_a_job_without_progress_is_abandoned(here, folder):
    job = Job(here, folder, "five", RESTARTS="1")
    for start in (1, 2):
        job.steps(3)
        os.kill(job.rank(0), signal.SIGKILL)
        assert job.ended(start) in (71, 137)
        if start == 1:
            here.now(job.number)
    job.until(lambda: "not restarted: 1 restarts since checkpoint none" in job.said)
    here.until(lambda: here.state(job.number)["JobState"] == "FAILED")
    assert job.restarts() == 1 and not (job.run / "restarts").exists()


def test_a_job_that_would_end_alike_is_not_requeued_and_a_cancelled_one_writes_first(here, folder):
    job = Job(here, folder, "three", "train.global_batch=7")
    assert job.ended(1) == 78
    here.until(lambda: here.state(job.number)["JobState"] == "FAILED")
    assert here.state(job.number)["ExitCode"] == "78:0" and job.restarts() == 0
    job = Job(here, folder, "four")
    job.steps(5)
    here.run("scancel", job.number)
    here.until(lambda: here.state(job.number)["JobState"] == "CANCELLED")
    job.until(lambda: "(SIGTERM to rank" in job.said)
    assert newest(job.run) > 0 and newest_valid(job.run).manifest.step == newest(job.run)


def test_a_preempted_job_writes_first_and_resumes_afterwards(here, folder):
    job = Job(here, folder, "six")
    job.steps(5)
    urgent = here.submit(folder, "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert job.ended(1) == 76
    job.until(lambda: "(SIGTERM to rank" in job.said and "exit code 75; restart" in job.said)
    here.until(lambda: here.state(urgent)["JobState"] == "COMPLETED")
    here.now(job.number)
    job.steps(5)
    assert f"resumed from {job.run}/checkpoints/step-" in job.of_start(2) and job.restarts() == 1
    here.run("scancel", job.number)
    here.until(lambda: here.state(job.number)["JobState"] == "CANCELLED")


def test_a_job_that_is_cancelled_as_it_starts_exits_by_itself(here, folder):
    job = Job(here, folder, "seven")
    job.until(lambda: len(job.ranks()) == 2)  # any earlier, srun would wait past KillWait for the step that it is launching
    here.run("scancel", job.number)
    here.until(lambda: here.state(job.number)["JobState"] == "CANCELLED")
    job.until(lambda: "ended with" in job.said)  # not printed if SLURM kills it after KillWait
    assert job.restarts() == 0 and "Traceback" not in job.said
