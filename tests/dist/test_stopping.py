"""One of several ranks is asked to stop: all exit after the same step with a checkpoint, and resume from it bitwise."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.processes import Ended, finish, start
from xar_scale.checkpoint.manifest import checkpoint_paths, newest_valid, step_of

STEPS = 120
SETTINGS = ["model.width=16", "model.heads=2", "train.global_batch=24", "optim.warmup_steps=5", "train.log_every=1"]
SETTINGS += [f"train.steps={STEPS}", "train.engine=fsdp2", "train.checkpoint_every=1000", "optim.ema_snapshots_every=50"]


def train(folder: Path, name: str, *more: str, meanwhile=None, world: int = 2) -> Ended:
    words = ["-m", "xar_scale", "train", "--recipe", "digits", "--run-dir", str(folder / name), f"data.path={folder / 'data'}"]
    logs = folder / "logs" / name
    ranks = start(world, [*words, *SETTINGS, *more], logs)
    return finish(ranks, logs, meanwhile and (lambda: meanwhile(ranks)))


def after_steps(run: Path, count: int, do):
    def wait(ranks) -> None:
        metrics, begun = run / "metrics.jsonl", time.monotonic()
        while not metrics.exists() or metrics.read_text().count("\n") < count:
            assert time.monotonic() - begun < 200 and ranks[0].poll() is None
            time.sleep(0.01)
        do(ranks)

    return wait


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def assert_stopped(ended: Ended, run: Path, why: str, code: int = 76) -> int:
    assert ended.codes == [code, code], ended.text
    said = re.search(r"^xar-scale: stopped after step (\d+) of 120 \((.*)\): a checkpoint is written", ended.text, re.MULTILINE)
    assert said and re.fullmatch(why, said[2]), ended.text
    assert newest_valid(run).manifest.step == int(said[1]) == step_of(checkpoint_paths(run)[-1])
    assert ended.text.count("stopped after") == 1 and "Traceback" not in ended.text
    return int(said[1])


@pytest.mark.long
def test_a_stop_request_to_one_rank_stops_all_and_the_run_resumes_bitwise(folder):
    run = folder / "run"
    for number, name, code in ((signal.SIGTERM, "SIGTERM", 76), (signal.SIGUSR2, "SIGUSR2", 75), (signal.SIGINT, "SIGINT", 76)):
        before = step_of(checkpoint_paths(run)[-1]) if run.exists() else 0
        count = before + 8
        one = after_steps(run, count, lambda ranks, number=number: os.kill(ranks[1].pid, number))
        assert assert_stopped(train(folder, "run", meanwhile=one), run, f"{name} to rank 1", code) >= count
    file = after_steps(run, step_of(checkpoint_paths(run)[-1]) + 8, lambda ranks: (run / "STOP").touch())
    assert_stopped(train(folder, "run", meanwhile=file), run, f"{run}/STOP exists")
    assert not (run / "STOP").exists()
    assert train(folder, "run").codes == [0, 0]
    assert train(folder, "undisturbed").codes == [0, 0]
    assert losses(run) == losses(folder / "undisturbed")
    for kind in ("ema", "checkpoints"):
        names = [path.name for path in checkpoint_paths(folder / "undisturbed", kind)]
        assert set(names) <= {path.name for path in checkpoint_paths(run, kind)}


@pytest.fixture(scope="module")
def late(folder) -> Ended:
    return train(folder, "late", "--stop-after", "1s")


def test_a_time_limit_shorter_than_the_first_step_still_leaves_a_checkpoint(folder, late):
    assert assert_stopped(late, folder / "late", "--stop-after 1 s has passed") == 1


@pytest.mark.usefixtures("late")
def test_two_ranks_of_the_engine_for_one_are_refused_with_one_line(folder):
    ended = train(folder, "late", "train.engine=single")
    assert ended.codes == [78, 78] and ended.text.count("xar-scale: ") == 1 and "Traceback" not in ended.text, ended.text
    assert "train.engine single is one process, not 2; use train.engine=ddp, fsdp2 or deepspeed" in ended.outputs[0]
