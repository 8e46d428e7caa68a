"""Images and metrics on several ranks: the same as on one, also with sharded weights, and after a kill."""

import json
import os
import signal
import time

import numpy as np
import pytest

from tests.processes import finish, launch, start
from tests.unit.tiny_run import Run
from xar_scale.checkpoint.manifest import verify

COUNT = 1100  # five parts
FEW = ["sample.sampler=euler", "sample.steps=4", "sample.guidance=1.5", "sample.batch=64", "sample.precision=fp32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"))
    run.train(3)
    return str(verify(run.save()).path)


def words(checkpoint: str, out, *more: str) -> list[str]:
    command = ["-m", "xar_scale", "evaluate", checkpoint, "--reference", "digits", "--images", str(COUNT)]
    return [*command, "--out", str(out), *FEW, *more]


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    ended = launch(1, words(checkpoint, folder / "set"), folder / "logs")
    assert ended.codes == [0], ended.text
    return folder / "set"


def parts(folder) -> list[np.ndarray]:
    return [np.load(path) for path in sorted(folder.glob("part-*.npy"))]


def metrics(folder) -> dict:
    return json.loads((folder / "digits" / "evaluation.json").read_text())["metrics"]


def assert_same(folder, expected) -> None:
    found, wanted = parts(folder), parts(expected)
    assert len(found) == 5 and all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert metrics(folder) == pytest.approx(metrics(expected), rel=1e-6)


def test_three_ranks_generate_the_set_that_one_generates(checkpoint, alone, tmp_path):
    ended = launch(3, words(checkpoint, tmp_path / "set"), tmp_path / "logs")
    assert ended.codes == [0, 0, 0], ended.text
    assert ended.outputs[0].count("\nfrechet_distance ") == 1 and "frechet_distance" not in ended.outputs[1]
    assert_same(tmp_path / "set", alone)


def test_killed_in_the_middle_the_set_is_finished_by_another_number_of_ranks(checkpoint, alone, tmp_path):
    ranks = start(2, words(checkpoint, tmp_path / "set"), tmp_path / "logs")

    def kill() -> None:
        deadline = time.monotonic() + 200
        while not [*(tmp_path / "set").glob("part-*.npy")] and time.monotonic() < deadline:
            time.sleep(0.02)
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)

    finish(ranks, tmp_path / "logs", kill)
    there = len(parts(tmp_path / "set"))
    assert 1 <= there <= 5 and not (tmp_path / "set" / "digits").exists()
    ended = launch(1, words(checkpoint, tmp_path / "set"), tmp_path / "more")
    assert ended.codes == [0] and f"{there} already done" in ended.text
    assert_same(tmp_path / "set", alone)


SHARED = """
import sys
from pathlib import Path
import torch
from xar_scale import dist
from xar_scale.evaluate.generate import open_generator
from xar_scale.evaluate.trained import open_trained
device = torch.device("cpu")
dist.init(device)
trained = open_trained(Path(sys.argv[1]), sys.argv[2:])
generator = open_generator(trained, device)
held = sum(parameter.to_local().numel() for parameter in generator.model.parameters())
whole = sum(parameter.numel() for parameter in generator.model.parameters())
print("held", held / whole, flush=True)
most = 0
def look(*_):
    global most
    whole_now = {p.untyped_storage().data_ptr(): p.numel() for p in generator.model.parameters() if not hasattr(p, "to_local")}
    most = max(most, sum(whole_now.values()) / whole)
for block in generator.model.blocks:
    block.attn.register_forward_hook(look)
generator.draw([1, 2, 3], 0)
print("at once", most, flush=True)
dist.leave(0)
"""


@pytest.mark.long
def test_ranks_with_sharded_weights_generate_the_same(checkpoint, alone, tmp_path):
    """No rank ever holds all weights."""
    ended = launch(2, ["-c", SHARED, checkpoint, *FEW, "sample.shard_ranks=2"], tmp_path / "held")
    assert ended.codes == [0, 0], ended.text
    for output in ended.outputs:
        said = [line.rpartition(" ") for line in output.splitlines() if line.startswith(("held", "at once"))]
        numbers = {name: float(number) for name, _, number in said}
        assert 0.45 < numbers["held"] < 0.55 and 0 < numbers["at once"] < 0.6
    ended = launch(2, words(checkpoint, tmp_path / "set", "sample.shard_ranks=2"), tmp_path / "logs")
    assert ended.codes == [0, 0], ended.text
    assert "weights sharded over 2 ranks" in ended.text
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(parts(tmp_path / "set"), parts(alone), strict=True)) <= 1


@pytest.mark.long
def test_images_are_distributed_over_ranks_and_gathered(checkpoint, tmp_path):
    drawn = ["-m", "xar_scale", "sample", checkpoint, "--classes", "3,7", "--seeds", "0-2", *FEW]
    for world, more in ((1, []), (3, []), (2, ["sample.shard_ranks=2"])):
        out = ["--out", str(tmp_path / f"{world}.npz"), "--out", str(tmp_path / f"{world}.gif")]
        ended = launch(world, [*drawn, *out, *more], tmp_path / f"logs{world}")
        assert ended.codes == [0] * world and ended.text.count("6 images of") == 1, ended.text
    one, three, shared = (np.load(tmp_path / f"{world}.npz")["arr_0"].astype(int) for world in (1, 3, 2))
    assert len(one) == 6 and np.abs(one - three).max() <= 1 and np.abs(one - shared).max() <= 1


def test_a_part_that_one_rank_cannot_read_ends_all(checkpoint, alone, tmp_path):
    (tmp_path / "set").mkdir()
    for path in alone.glob("*.*"):
        (tmp_path / "set" / path.name).write_bytes(path.read_bytes())
    torn = tmp_path / "set" / "part-00001.npy"
    torn.write_bytes(torn.read_bytes()[:-1])
    ended = launch(2, words(checkpoint, tmp_path / "set"), tmp_path / "logs")
    assert ended.codes == [65, 65] and ended.text.count("part-00001.npy is torn") == 1 and "Traceback" not in ended.text


def test_a_part_that_one_rank_cannot_write_ends_all(checkpoint, alone, tmp_path):
    (tmp_path / "set" / "part-00001.npy").mkdir(parents=True)
    (tmp_path / "set" / "set.json").write_bytes((alone / "set.json").read_bytes())
    ended = launch(2, words(checkpoint, tmp_path / "set"), tmp_path / "logs")
    assert ended.codes == [74, 74] and ended.text.count("part-00001.npy: Is a directory") == 1 and "Traceback" not in ended.text
    assert [path.name for path in (tmp_path / "set").glob("part-*") if path.is_file()] == ["part-00000.npy"]
