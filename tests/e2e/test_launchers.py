"""The launchers on this machine: signals, and two nodes of which one loses a rank; the run exits or resumes correctly."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import ROOT, environment, free_port, ranks
from xar_scale.checkpoint.manifest import checkpoint_paths, step_of

STEPS = 80
SETTINGS = ["model.width=16", "model.heads=2", "train.global_batch=24", "train.log_every=1", "optim.warmup_steps=5"]
SETTINGS += [f"train.steps={STEPS}", "train.checkpoint_every=1000", "data.workers=1"]


class Launched:
    """A running launcher; all processes that it started are gone after the context."""

    def __init__(self, folder: Path, launcher: str, run: str, *words: str, log: str = "", **more: str) -> None:
        self.run, self.log = folder / run, folder / f"{log or run}.log"
        command = [str(ROOT / "launchers" / launcher), "train", "--recipe", "digits", "--run-dir", str(self.run)]
        command += [f"data.path={folder / 'data'}", *SETTINGS, *words]
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                command, env=environment() | more, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.process.pid, *ranks(self.run).values()]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(pid), signal.SIGKILL)
        self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, what, limit_s: float = 300) -> None:
        begun = time.monotonic()
        while not what():
            assert time.monotonic() - begun < limit_s, self.said
            time.sleep(0.05)

    def steps(self, count: int, starts: int = 1) -> None:
        """Wait for this many steps of the ``starts``-th start."""
        of_start = lambda: re.split(r"\d parameters, ", self.said)[starts:]  # noqa: E731
        self.until(lambda: of_start() and of_start()[0].count("\nstep ") >= count)

    def code(self, limit_s: float = 300) -> int:
        return self.process.wait(timeout=limit_s)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def newest(run: Path) -> int:
    return step_of(checkpoint_paths(run)[-1])


def undisturbed(folder, engine) -> list[float]:
    with Launched(folder, "deepspeed.sh", f"undisturbed-{engine}", f"train.engine={engine}") as launched:
        assert launched.code() == 0, launched.said
    return losses(folder / f"undisturbed-{engine}")


@pytest.mark.parametrize(
    ("launcher", "engine"), [("torchrun.sh", "fsdp2"), pytest.param("deepspeed.sh", "deepspeed", marks=pytest.mark.long)]
)
def test_signals_to_a_launcher_end_all_ranks_with_a_checkpoint(folder, launcher, engine):
    run = f"{launcher}-signals"
    for number, code in ((signal.SIGTERM, 76), (signal.SIGUSR2, 75)):
        with Launched(folder, launcher, run, f"train.engine={engine}", log=f"{run}-{number}") as launched:
            launched.steps(10)
            launched.process.send_signal(number)
            assert launched.code() == code, launched.said
            said = f"stopped after step {newest(launched.run)} of {STEPS} ({signal.Signals(number).name} to rank"
            assert f"xar-scale: {said}" in launched.said
            launched.until(lambda: not ranks(launched.run))
            assert "xar_scale/cli.py" not in launched.said  # none of our tracebacks


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["deepspeed.sh", "torchrun.sh"])
def test_two_nodes_resume_after_a_rank_of_one_is_killed(folder, launcher):
    engine = "deepspeed" if launcher == "deepspeed.sh" else "fsdp2"
    run, words = f"{launcher}-nodes", [f"train.engine={engine}", "train.checkpoint_every=20"]
    (folder / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RESTARTS": "3", "PAUSE": "5"}
    if engine == "deepspeed":
        shared |= {"HOSTFILE": str(folder / "hostfile")}
    else:
        shared |= {"NODES": "2", "PROCESSES": "1", "JOB": "two"}
    first, second = (
        Launched(folder, launcher, run, *words, log=f"{run}-{node}", **shared, NODE_RANK=str(node)) for node in range(2)
    )
    with first, second:
        speaker = lambda: first if "parameters, " in first.said else second  # noqa: E731  # torchrun chooses
        first.until(lambda: "parameters, " in first.said + second.said)
        speaker().steps(30)
        victim = ranks(second.run)[1]
        os.kill(victim, signal.SIGKILL)
        codes = [first.code(), second.code()]
        assert codes == [0, 0], first.said + second.said
    assert "restart 1 since" in first.said and "restart 1 since" in second.said
    assert losses(first.run) == undisturbed(folder, engine)
