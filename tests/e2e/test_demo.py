"""The demonstration in small, by its own commands: real images to tars, ZeRO-3 under DeepSpeed's launcher, samples, verdict."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import LIMIT_S, ROOT, environment
from xar_scale.guard import GuardState

METRICS = {"step", "loss", "lr", "grad_norm", "images_per_s", "tflops_per_s", "step_s", "data_wait_s", "memory_gb", "epoch"}
METRICS |= {"bad_samples", "largest_activation", "checkpoint_stall_s"} | set(GuardState().counts)


def command(*words: str, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """A command as typed in the activated environment; nothing of it is left running."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment() | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def trained(folder):
    cached = command(sys.executable, "tools/cache_latents.py", "digits", "--out", str(folder / "data"))
    assert (cached.returncode, cached.stdout) == (0, f"1797 samples in 8 shards: {folder / 'data'}\n"), cached.stderr
    more = ["train.steps=300", "train.checkpoint_every=250", "optim.lr=4e-3", f"data.path={folder / 'data'}"]
    done = command("launchers/deepspeed.sh", "train", "--recipe", "digits", "--run-dir", str(folder / "run"), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.timeout(300)
def test_training_reports_itself(folder, trained):
    assert "1,260,460 parameters, 1,797 samples, deepspeed on 2 x cpu, fp32" in trained.stdout
    assert trained.stdout.count("step 100/300  loss ") == 1  # by one rank, in plain lines off a terminal
    assert "ETA" in trained.stdout
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(20, 301, 20))
    # a word, and a number a rank: TensorBoard has no curve for them
    assert all(set(line) == METRICS | {"precision", "forward_s"} and len(line["forward_s"]) == 2 for line in lines)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    events = EventAccumulator(str(folder / "run" / "tensorboard")).Reload()
    assert {tag.removeprefix("train/") for tag in events.Tags()["scalars"]} == METRICS - {"step"}
    assert events.Scalars("train/loss")[-1].value == pytest.approx(lines[-1]["loss"])
    assert sorted(os.listdir(folder / "run" / "checkpoints")) == ["latest", "step-00000250", "step-00000300"]


@pytest.mark.timeout(300)
def test_the_saved_config_is_the_run(folder, trained):
    printed = command("xar-scale", "train", "--config", str(folder / "run" / "config.yaml"), "--print-config")
    assert printed.stdout == (folder / "run" / "config.yaml").read_text()
    assert "steps: 300" in printed.stdout


@pytest.mark.timeout(300)
def test_samples_are_read_as_what_was_asked_for(folder, trained):
    picture = folder / "samples.png"
    sampled = command("xar-scale", "sample", str(folder / "run"), "--per-class", "20", "--out", str(picture))
    assert sampled.returncode == 0, sampled.stderr
    with np.load(folder / "samples.npz") as archive:
        assert archive["images"].shape == (200, 1, 8, 8) and archive["images"].dtype == np.uint8
        assert np.array_equal(archive["labels"], np.repeat(np.arange(10), 20))
        images = archive["images"]
    assert len(np.unique(images.reshape(200, -1), axis=0)) == 200
    with Image.open(picture) as opened:
        assert opened.height == 10 * 52 + 4 and opened.width > 10 * 52 + 4  # ten rows of ten, and their names

    judged = command("xar-scale", "evaluate", str(folder / "samples.npz"), "--out", str(folder / "verdict.json"))
    assert judged.returncode == 0, judged.stderr
    verdict = json.loads((folder / "verdict.json").read_text())
    assert f"samples read as the class asked for: {verdict['samples']:.1%} of 200" in judged.stdout
    assert f"held-out real digits read rightly:   {verdict['held_out']:.1%} of 450" in judged.stdout
    assert verdict["held_out"] > 0.97
    assert verdict["samples"] > 0.75  # in less than half of the steps
    assert verdict["samples"] == pytest.approx(np.mean(list(verdict["by_class"].values())))

    shuffled = folder / "shuffled.npz"  # the judge is no rubber stamp
    np.savez(shuffled, images=images, labels=(np.repeat(np.arange(10), 20) + 1) % 10)
    command("xar-scale", "evaluate", str(shuffled), "--out", str(folder / "shuffled.json"))
    assert json.loads((folder / "shuffled.json").read_text())["samples"] < 0.1


@pytest.mark.timeout(300)
def test_a_picture_depends_on_its_seed_and_place_not_on_the_batch(folder, trained):
    def draw(name: str, *more: str) -> np.ndarray:
        out = folder / f"{name}.png"
        done = command(
            "xar-scale", "sample", str(folder / "run"), "--classes", "3,7", "--per-class", "3", "--out", str(out), *more
        )
        assert done.returncode == 0, done.stderr
        with np.load(folder / f"{name}.npz") as archive:
            return archive["images"].astype(int)

    first = draw("first", "sample.batch=6")
    assert np.abs(first - draw("small", "sample.batch=4")).max() <= 1  # a grey level
    assert np.abs(first - draw("other", "--seed", "1")).max() > 20


def test_the_launcher_passes_the_exit_code_on():
    done = command("launchers/deepspeed.sh", "train", "--recipe", "nosuch")
    assert done.returncode == 64
    assert done.stderr.count("xar-scale: no recipe 'nosuch'") == 1
