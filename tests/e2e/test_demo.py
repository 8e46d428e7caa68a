"""The demonstration in small, by its own commands: real images to tars, ZeRO-3 under DeepSpeed's launcher, samples, verdict."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import command
from xar_scale.cli import main
from xar_scale.guard import GuardState

METRICS = {"step", "loss", "lr", "grad_norm", "images_per_s", "tflops_per_s", "step_s", "data_wait_s", "memory_gb", "epoch"}
METRICS |= {"bad_samples", "largest_activation", "checkpoint_stall_s"} | set(GuardState().counts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def trained(folder):
    cached = command(sys.executable, "tools/cache_latents.py", "digits", "--out", str(folder / "data"))
    assert (cached.returncode, cached.stdout) == (0, f"1797 samples in 8 shards: {folder / 'data'}\n"), cached.stderr
    more = [
        "train.steps=160",
        "train.checkpoint_every=120",
        "model.width=64",
        "model.heads=2",
        "optim.lr=6e-3",
        "optim.ema_decay=0.97",  # with the recipe's, an average of so few steps is still that of noise
        "sample.every=80",
        f"data.path={folder / 'data'}",
    ]
    done = command("launchers/deepspeed.sh", "train", "--recipe", "digits", "--run-dir", str(folder / "run"), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_training_reports_itself(folder, trained):
    assert "326,868 parameters, 1,797 samples, deepspeed on 2 x cpu, fp32" in trained.stdout
    assert trained.stdout.count("step 100/160  loss ") == 1  # by one rank, in plain lines off a terminal
    assert "ETA" in trained.stdout
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20, 161, 20))
    # a word, and a number a rank: TensorBoard has no curve for them
    assert all(set(line) == METRICS | {"precision", "forward_s"} and len(line["forward_s"]) == 2 for line in lines)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    events = EventAccumulator(str(folder / "run" / "tensorboard")).Reload()
    assert {tag.removeprefix("train/") for tag in events.Tags()["scalars"]} == METRICS - {"step"}
    assert events.Scalars("train/loss")[-1].value == pytest.approx(lines[-1]["loss"])
    assert sorted(os.listdir(folder / "run" / "checkpoints")) == ["latest", "step-00000120", "step-00000160"]


def test_the_saved_config_is_the_run(folder, trained):
    printed = command("xar-scale", "train", "--config", str(folder / "run" / "config.yaml"), "--print-config")
    assert printed.stdout == (folder / "run" / "config.yaml").read_text()
    assert "steps: 160" in printed.stdout


def test_samples_are_drawn_evaluated_and_reported(folder, trained):
    run, picture, archive = folder / "run", folder / "samples.png", folder / "samples.npz"
    sampled = command("xar-scale", "sample", str(run), "--out", str(picture), "--out", str(archive))
    assert sampled.returncode == 0, sampled.stderr
    with np.load(archive) as opened:
        images, labels = opened["arr_0"], opened["arr_1"]
    assert images.shape == (100, 8, 8, 3) and np.array_equal(labels, np.tile(np.arange(10), 10))
    assert len(np.unique(images.reshape(100, -1), axis=0)) == 100
    with Image.open(picture) as grid:
        assert grid.height == 10 * 52 + 4 and grid.width > 10 * 52 + 4  # ten rows of ten, and their names

    judged = command("xar-scale", "evaluate", str(run), "--reference", "digits", "--images", "300")
    assert judged.returncode == 0, judged.stderr
    metrics = json.loads((run / "evaluations" / "step-00000160" / "digits" / "evaluation.json").read_text())["metrics"]
    for name, value in metrics.items():
        assert f"\n{name:32} {value:.4f}\n" in judged.stdout
    assert metrics["held_out_read_as_class"] > 0.97
    assert metrics["read_as_class"] > 0.3  # three times what chance gives, in less than a third of the steps
    assert 0 < metrics["held_out_frechet_distance"] < metrics["frechet_distance"]

    shuffled = folder / "shuffled.npz"  # wrong labels must not be read as right
    np.savez(shuffled, arr_0=images, arr_1=(labels + 1) % 10)
    assert main(["evaluate", str(shuffled), "--reference", "digits", "--out", str(folder / "shuffled")]) == 0
    assert json.loads((folder / "shuffled" / "digits" / "evaluation.json").read_text())["metrics"]["read_as_class"] < 0.1

    assert command("xar-scale", "report", str(run)).returncode == 0
    page = (run / "report.html").read_text()
    assert "frechet" in page and f"{metrics['read_as_class']:.3g}"[:4] in page and page.count("data:image/") == 2  # the grids


def test_the_launcher_passes_the_exit_code_on():
    done = command("launchers/deepspeed.sh", "train", "--recipe", "nosuch")
    assert done.returncode == 64
    assert done.stderr.count("xar-scale: no recipe 'nosuch'") == 1
