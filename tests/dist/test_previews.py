"""Previews during training: the images that the checkpoint gives later, and no effect on the run."""

import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import launch
from tests.unit.conftest import assert_ends
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import newest_valid
from xar_scale.cli import main
from xar_scale.evaluate.digits import cache_digits

SETTINGS = ["model.width=32", "model.heads=2", "train.global_batch=24", "train.log_every=1", "optim.warmup_steps=2"]
SETTINGS += ["train.steps=6", "train.checkpoint_every=4", "data.workers=1", "sample.steps=3", "optim.ema_decay=0.5"]
PREVIEWS = ["sample.every=2", "sample.shown=[3,7]", "evaluate.every=4", "evaluate.images=50", "evaluate.reference=digits"]


def train(folder, name: str, world: int, *more: str):
    words = ["train", "--recipe", "digits", "--run-dir", str(folder / name), f"data.path={folder / 'data'}", *SETTINGS, *more]
    ended = launch(world, ["-m", "xar_scale", *words], folder / "logs" / name)
    assert ended.codes == [0] * world, ended.text
    return ended


def logged(run) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize(
    ("engine", "world", "precision"),
    [("deepspeed", 2, "bf16"), *(pytest.param(engine, 3, "fp32", marks=pytest.mark.long) for engine in ("fsdp2", "ddp"))],
)
def test_previews_do_not_change_the_run(tmp_path, engine, world, precision):
    cache_digits(tmp_path / "data", samples_per_shard=500)
    more = [f"train.engine={engine}", f"train.precision={precision}"]
    plain, drawing = tmp_path / "plain", tmp_path / "drawing"
    train(tmp_path, "plain", world, *more)
    ended = train(tmp_path, "drawing", world, *more, *PREVIEWS)
    assert "Traceback" not in ended.text and "Invalidate" not in ended.text
    assert logged(drawing) == logged(plain)
    for kind in ("model", "ema", "exp_avg_sq"):
        ours, theirs = (load_weights(newest_valid(run), kind) for run in (drawing, plain))
        assert all(ours[name].equal(theirs[name]) for name in theirs), kind

    assert sorted(path.name for path in (drawing / "samples").iterdir()) == [f"step-{n:08d}.png" for n in (2, 4, 6)]
    assert not (plain / "samples").exists()
    grids = [np.asarray(Image.open(path)).astype(int) for path in sorted((drawing / "samples").iterdir())]
    later = tmp_path / "later.png"
    words = ["sample", str(drawing), "--classes", "3,7", "--seeds", "0-3", "--out", str(later), f"sample.precision={precision}"]
    assert main(words) == 0
    off = np.abs(np.asarray(Image.open(later)).astype(int) - grids[-1])
    assert off.max() <= 2 if precision == "fp32" else np.mean(off) < 2  # of its EMA weights, not of the weights
    assert np.abs(grids[0] - grids[-1]).mean() > 2

    results = sorted((drawing / "evaluations").glob("*/evaluation.json"))
    assert [path.parent.name for path in results] == ["training-step-00000004", "training-step-00000006"]
    last = json.loads(results[-1].read_text())
    assert last["weights"]["step"] == 6 and last["set"]["images"] == 50 and last["set"]["classes"] == 10
    assert last["set"]["sample"]["precision"] == precision and last["set"]["sample"]["steps"] == 3
    events = EventAccumulator(str(drawing / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4, 6]
    shown = events.Images("samples")[-1].encoded_image_string
    assert shown == (drawing / "samples" / "step-00000006.png").read_bytes()
    distances = events.Scalars("evaluate/frechet_distance")
    assert [event.step for event in distances] == [4, 6]
    assert distances[-1].value == pytest.approx(last["metrics"]["frechet_distance"], rel=1e-5)


def test_impossible_previews_are_refused_before_training(tmp_path, capsys):
    cache_digits(tmp_path / "data", samples_per_shard=500)
    for more, code, said in (
        (["evaluate.every=2"], 78, "evaluate.every is 2, but evaluate.reference is not set"),
        (["evaluate.every=2", "evaluate.reference=nowhere.npz"], 64, "no reference at nowhere.npz"),
        (["sample.every=2", "sample.shown=[10]"], 78, "sample.shown holds 10, the model's classes are 0..9"),
        (["sample.every=2", "sample.tokenizer_weights=x"], 78, "tokenizer pixel has no weights"),
    ):
        words = ["train", "--recipe", "digits", "--run-dir", str(tmp_path / "run"), f"data.path={tmp_path / 'data'}", *SETTINGS]
        assert_ends(capsys, [*words, "train.engine=single", *more], code, said)
        assert not (tmp_path / "run").exists()
