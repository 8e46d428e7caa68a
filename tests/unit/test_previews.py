"""Previews with EMA weights during training, in one process: they match the checkpoint, and failures do not end the run."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.tiny_run import CONFIG, INFO, Run
from xar_scale import dist
from xar_scale.checkpoint.manifest import verify
from xar_scale.config import EvaluateConfig
from xar_scale.evaluate.evaluation import Comparison, image_set
from xar_scale.evaluate.generate import open_generator
from xar_scale.evaluate.previews import Previews, _LazyImages
from xar_scale.evaluate.trained import open_trained

COUNT = 23
SAMPLE = replace(CONFIG.sample, every=1, sampler="euler", steps=2, guidance=1.5)
DRAWING = replace(CONFIG, sample=SAMPLE, evaluate=EvaluateConfig(every=1, images=COUNT, reference="digits"))


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path, config=DRAWING)
    made.train(3)
    return made


def previews(run, folder) -> Previews:
    return Previews(DRAWING, folder, run.engine, run.ema, INFO)


def test_images_are_those_of_a_set_on_any_number_of_ranks(monkeypatch):
    """Classes in turn, with the noise of their numbers; every rank runs the same number of batches."""
    drawn = []

    class Drawing:
        settings = replace(SAMPLE, batch=4)

        def draw(self, labels, seed, first, batches):
            drawn.extend(zip(labels, range(first, first + len(labels)), strict=True))
            assert seed == 0 and math.ceil(len(labels) / 4) <= batches == math.ceil(math.ceil(COUNT / images.parts) / 4)
            return np.zeros((len(labels), 1, 8, 8), np.uint8)

    for world in (1, 3):
        monkeypatch.setattr(dist, "world", lambda world=world: world)
        images = _LazyImages(Drawing(), COUNT, 10)
        assert images.parts == world
        assert sum(len(images.read(part)) for part in range(images.parts)) == COUNT
        assert drawn == [(number % 10, number) for number in range(COUNT)]
        drawn.clear()


def test_the_metrics_are_those_of_the_checkpoint(tmp_path, run):
    """With its EMA weights and its settings."""
    trained = open_trained(verify(run.save()).path, [])
    images = image_set(trained, tmp_path / "set", COUNT, 0)
    images.open()
    images.draw(open_generator(trained, torch.device("cpu")))
    later = Comparison("digits", "digits-svm", torch.device("cpu")).evaluate(images, None, {})["metrics"]
    numbers = previews(run, tmp_path).take(3, 3).numbers
    assert numbers["frechet_distance"] == pytest.approx(later["frechet_distance"], rel=1e-3)  # up to a grey level
    assert set(numbers) == {"frechet_distance", "precision", "recall"}


def test_non_finite_samples_do_not_end_the_run(tmp_path, run, capsys):
    run.ema.averages["ema"][0].fill_(float("nan"))
    before = run.state()
    shown = previews(run, tmp_path).take(3, 3)
    assert shown.pictures == {} and shown.numbers == {} and not (tmp_path / "samples").exists()
    said = capsys.readouterr().out
    assert said.count("step 3: no samples: ") == said.count("step 3: no metrics: ") == 1 and "NaN or infinite" in said
    # the corrupted EMA too, in which NaN equals nothing
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, run.state(), strict=True))


def test_a_full_disk_does_not_end_the_run(tmp_path, run, capsys):
    for name in ("samples", "evaluations"):
        (tmp_path / name).write_text("in the way")
    shown = previews(run, tmp_path).take(3, 3)
    assert shown.pictures.keys() == {"samples"} and "recall" in shown.numbers
    assert capsys.readouterr().out.count("cannot be written: ") == 2


def test_an_evaluation_repeated_after_a_restart_replaces_the_first(tmp_path, run):
    for _ in range(2):
        numbers = previews(run, tmp_path).take(3, 3).numbers
    kept = json.loads((tmp_path / "evaluations" / "training-step-00000003" / "evaluation.json").read_text())
    assert numbers.items() <= kept["metrics"].items()


def test_an_evaluation_of_other_images_stays_and_what_is_said_of_it_fits_a_run(tmp_path, run, capsys):
    previews(run, tmp_path).take(3, 3)
    path = tmp_path / "evaluations" / "training-step-00000003" / "evaluation.json"
    before = path.read_bytes()
    resumed = replace(DRAWING, sample=replace(SAMPLE, guidance=2.0))
    numbers = Previews(resumed, tmp_path, run.engine, run.ema, INFO).take(3, 3).numbers
    assert "recall" in numbers and path.read_bytes() == before
    remedy = "remove it or write elsewhere"  # train has no --out
    assert f"{path.parent} cannot be written: {path} has results of a different set; {remedy}\n" in capsys.readouterr().out
