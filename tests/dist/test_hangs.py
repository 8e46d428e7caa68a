"""One of several ranks hangs, is stopped or is slow: it is named with its stack, and a hanging job ends by itself."""

import json
import os
import re
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests.processes import Ended, finish, start
from xar_scale.checkpoint.manifest import newest_valid

SETTINGS = ["model.width=16", "model.heads=2", "train.global_batch=24", "optim.warmup_steps=5", "train.log_every=1"]
SETTINGS += ["train.hang_after=5", "train.hang_seconds=6", "train.ds_config=tests/dist/zero3.json"]


def run(folder: Path, name: str, engine: str, fault: dict, *more: str, steps: int = 4000, meanwhile=None, world: int = 2) -> Ended:
    own = [f"data.path={folder / 'data'}", f"train.engine={engine}", f"train.steps={steps}", "--run-dir", str(folder / name)]
    words = ["-m", "tests.injected", json.dumps([fault] if fault else []), "train", "--recipe", "digits"]
    logs = folder / "logs" / name
    ranks = start(world, [*words, *own, *SETTINGS, *more], logs)
    return finish(ranks, logs, meanwhile and (lambda: meanwhile(ranks)))


@pytest.mark.parametrize(("engine", "world"), [("fsdp2", 2), pytest.param("deepspeed", 3, marks=pytest.mark.long)])
def test_a_rank_that_does_not_enter_a_collective_is_named_with_its_stack(folder, engine, world):
    ended = run(folder, engine, engine, {"kind": "sleep", "step": 12, "value": 1000.0}, world=world)
    assert ended.codes == [69] * world, ended.text
    lines = ended.outputs[0].splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("xar-scale: hang: step 12 has taken "))
    assert lines[first + 1].startswith("rank 1 (") and "has not entered gloo:" in lines[first + 1], lines[first + 1]
    assert "it is in sleep (" in lines[first + 1] and "called by attempt (" in lines[first + 1]
    assert lines[first + 2].startswith("rank 0 (") and "hang:" not in "".join(ended.outputs[1:])
    for rank in range(world):
        report = folder / engine / "hangs" / f"step-00000012-rank-{rank}.txt"
        assert "tests/injected.py" in report.read_text() and '"groups"' in report.read_text()
    assert "in sleep" in (folder / engine / "hangs" / "step-00000012-rank-1.txt").read_text()


def test_a_rank_whose_data_do_not_come_is_named_and_no_training_is_lost(folder):
    """A checkpoint of the last step is written before the step would count as a hang."""
    more = ("train.hang_seconds=15", "train.checkpoint_every=1000", "data.workers=1")
    ended = run(folder, "late", "fsdp2", {"kind": "late", "step": 12, "value": 1000.0}, *more)
    assert ended.codes == [69, 69], ended.text
    said = re.search(r"^rank 1 \(\S+\) has waited 13 s for data; saving a checkpoint of step 12 ", ended.outputs[0], re.MULTILINE)
    assert said and "\nxar-scale: rank 1 (" in ended.outputs[0] and "hang:" not in ended.text, ended.text
    assert newest_valid(folder / "late").manifest.step == 12


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_rank_that_is_stopped_is_named_and_the_others_end(folder, stopped):
    name = f"stopped{stopped}"

    def stop(ranks) -> None:
        metrics, begun = folder / name / "metrics.jsonl", time.monotonic()
        while not metrics.exists() or metrics.read_text().count("\n") < 8:
            assert time.monotonic() - begun < 200
            time.sleep(0.05)
        os.kill(ranks[stopped].pid, signal.SIGSTOP)
        assert ranks[1 - stopped].wait(timeout=400) == 69
        os.kill(ranks[stopped].pid, signal.SIGKILL)

    ended = run(folder, name, "fsdp2", {}, meanwhile=stop)
    said = f"rank {stopped} does not answer: its process is stopped or its node is down"
    assert said in ended.outputs[1 - stopped], ended.text
    if stopped == 1:
        beat = json.loads((folder / name / "heartbeat.json").read_text())
        assert beat["step"] >= 5


def test_a_slow_rank_is_named_and_the_run_continues(folder):
    fault = {"kind": "slow", "step": 2, "until": 100, "value": 0.05}
    ended = run(folder, "slow", "fsdp2", fault, "train.hang_seconds=60", steps=10)
    assert ended.codes == [0, 0], ended.text
    assert ended.text.count(") is slow: its layers take ") == 1 and "rank 1 (" in ended.text
    lines = [json.loads(line) for line in (folder / "slow" / "metrics.jsonl").read_text().splitlines()]
    assert all(len(line["forward_s"]) == 2 for line in lines)
    assert statistics.median(line["forward_s"][1] - line["forward_s"][0] for line in lines[3:]) > 0.3
