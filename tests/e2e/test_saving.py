"""Saving in real runs: a full disk, a rank that cannot write or fails otherwise, and ranks that are killed meanwhile."""

import json
import random
import time
from pathlib import Path

import pytest

from tests.dist.states import assert_bitwise, state
from tests.processes import Ended, finish, kill, launch, start
from xar_scale.checkpoint.manifest import EMA_SNAPSHOTS, checkpoint_paths, newest_valid, verify

STEPS = 60
SMALL = ["model.width=16", "model.heads=2", "train.global_batch=8", "optim.warmup_steps=5", "train.log_every=5"]
TWO = [*SMALL, f"train.steps={STEPS}", "train.engine=fsdp2", "train.checkpoint_every=10", "optim.ema_snapshots_every=4"]
KILLS = 4


def words(folder: Path, run: Path, *more: str) -> list[str]:
    return ["train", "--recipe", "digits", "--run-dir", str(run), f"data.path={folder / 'data'}", *more]


@pytest.fixture(scope="module")
def undisturbed(folder):
    ended = launch(2, ["-m", "xar_scale", *words(folder, folder / "undisturbed", *TWO)], folder / "logs" / "undisturbed")
    assert ended.codes == [0, 0], ended.text
    return folder / "undisturbed"


def faulty(folder: Path, name: str, *faults: dict) -> Ended:
    return launch(2, ["-m", "tests.injected", json.dumps(faults), *words(folder, folder / name, *TWO)], folder / "logs" / name)


def assert_same_end(run: Path, undisturbed: Path) -> None:
    assert_bitwise(state(run, STEPS), state(undisturbed, STEPS))
    kept = [path.name for path in checkpoint_paths(undisturbed, EMA_SNAPSHOTS)]
    assert [path.name for path in checkpoint_paths(run, EMA_SNAPSHOTS)] == kept and len(kept) == STEPS // 4
    for name in kept:
        verify(run / EMA_SNAPSHOTS / name)


def test_a_rank_that_cannot_write_makes_all_ranks_try_again(folder, undisturbed):
    ended = faulty(folder, "one", {"kind": "disk", "step": 9, "until": 12})
    assert ended.codes == [0, 0], ended.text
    file = "checkpoints/.step-00000010.tmp/shard-00002-model-00001-of-00001.safetensors"
    assert f"attempt 1 failed: {folder / 'one'}/{file}: No space left on device" in ended.outputs[0]
    assert "planted" not in ended.text
    assert_same_end(folder / "one", undisturbed)


def test_a_defect_on_one_rank_ends_all_also_where_another_would_try_again(folder, undisturbed):
    ended = faulty(
        folder, "two", {"kind": "defect", "step": 29, "until": 32}, {"kind": "disk", "step": 29, "until": 32, "rank": 0}
    )
    assert ended.codes == [1, 1], ended.text
    assert "attempt 1 failed" not in ended.text and "Traceback" not in ended.outputs[0]
    assert "RuntimeError: planted" in ended.outputs[1]
    assert newest_valid(folder / "two").manifest.step == 20


@pytest.mark.long
def test_ranks_that_are_killed_while_they_save_go_on_and_no_snapshot_is_missing(folder, undisturbed):
    run, logs = folder / "killed", folder / "logs" / "killed"
    for number in range(KILLS):
        ranks = start(2, ["-m", "xar_scale", *words(folder, run, *TWO)], logs)

        snapshot, checkpoint = (step // every * every + every for step, every in ((10 * number, 4), (10 * number, 10)))
        folders = [run / "ema" / f".step-{snapshot:08d}.tmp", run / "checkpoints" / f".step-{checkpoint:08d}.tmp"]

        def saving(ranks=ranks, folders=folders[number % 2 :]) -> None:
            begun = time.monotonic()
            while not any(folder.exists() for folder in folders):
                assert time.monotonic() - begun < 100 and ranks[0].poll() is None
                time.sleep(0.0002)
            time.sleep(random.uniform(0, 0.01))

        try:
            saving()
            kill([random.choice(ranks)])  # the launcher takes the other along
            time.sleep(random.uniform(0, 0.2))
        finally:
            kill(ranks)
    ended = finish(start(2, ["-m", "xar_scale", *words(folder, run, *TWO)], logs), logs)
    assert ended.codes == [0, 0], ended.text
    assert_same_end(run, undisturbed)


@pytest.mark.long
def test_a_full_disk_costs_a_run_the_checkpoints_of_that_time_and_no_more(folder, small_disk):
    disk = small_disk("24m")
    more = [*SMALL, "train.steps=900", "train.engine=single", "train.checkpoint_every=100", "optim.ema_snapshots_every=20"]
    run, logs, others = disk / "run", folder / "logs" / "full", disk / "others"

    def until(what) -> None:
        begun = time.monotonic()
        while not what((logs / "rank0.log").read_text()):
            assert time.monotonic() - begun < 60
            time.sleep(0.001)

    def meanwhile() -> None:
        until(lambda said: "step 5/900" in said)
        try:
            with others.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        except OSError:
            pass
        until(lambda said: "metrics cannot be written" in said and said.count("given up for the next one") > 6)
        others.unlink()

    ended = finish(start(1, ["-m", "xar_scale", *words(folder, run, *more)], logs), logs, meanwhile)
    assert ended.codes == [0], ended.text
    assert "No space left on device" in ended.text and "metrics are written again" in ended.text
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(5, 901, 5))
    # what a snapshot took the place of is written with the first one that can be
    line = next(
        line
        for line in ended.text.splitlines()
        if line.startswith("snapshot") and " and checkpoint " in line and ": done" in line
    )
    assert int(line.split("checkpoints/step-")[1][:8]) % 100, line
    assert newest_valid(run).manifest.step == 900
    again = launch(1, ["-m", "xar_scale", *words(folder, folder / "plenty", *more)], folder / "logs" / "plenty")
    assert again.codes == [0]
    assert_bitwise(state(run, 900), state(folder / "plenty", 900))
