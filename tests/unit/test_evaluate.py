"""Images from checkpoints, the grid, and the judge's complaints."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.tiny_run import CONFIG, Run
from xar_scale.checkpoint.store import load_weights, verify
from xar_scale.errors import DataError, UsageError
from xar_scale.evaluate.digits import judge, load_digits
from xar_scale.evaluate.generate import draw_grid, generate, open_checkpoint
from xar_scale.model.xar import XAR
from xar_scale.sampler import sample
from xar_scale.tokenizers.pixel import PixelTokenizer

CPU = torch.device("cpu")
SETTINGS = dataclasses.replace(CONFIG.sample, sampler="euler", steps=2, guidance=1.5, batch=64)


@pytest.fixture
def checkpoint(tmp_path):
    run = Run(tmp_path)
    run.train(5)
    return verify(run.save())


def test_images_are_drawn_from_the_averaged_weights(checkpoint):
    images = generate(checkpoint, [3, 7], SETTINGS, seed=4, device=CPU)
    expected = {}
    for which in ("ema", "model"):
        model = XAR(CONFIG.model)
        model.load_state_dict(load_weights(checkpoint, which))
        latents = sample(model, [3, 7], steps=2, guidance=1.5, sampler="euler", seed=4)
        expected[which] = PixelTokenizer().decode(latents)
    assert images.shape == (2, 1, 8, 8) and images.dtype == np.uint8
    assert np.array_equal(images, expected["ema"])
    assert not np.array_equal(images, expected["model"])


def test_the_batch_does_not_matter(checkpoint):
    together = generate(checkpoint, [1, 2, 3], SETTINGS, seed=0, device=CPU)
    apart = generate(checkpoint, [1, 2, 3], dataclasses.replace(SETTINGS, batch=2), seed=0, device=CPU)
    assert np.abs(together.astype(int) - apart).max() <= 1


def test_a_class_that_is_not_there_is_named(checkpoint):
    with pytest.raises(UsageError, match=r"class 10 is outside 0..9"):
        generate(checkpoint, [3, 10], SETTINGS, seed=0, device=CPU)


def test_a_run_stands_for_its_newest_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.save()
    run.train()
    newest = run.save()
    assert open_checkpoint(tmp_path).path == newest
    assert open_checkpoint(newest).path == newest
    with pytest.raises(UsageError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="no checkpoint in"):
        open_checkpoint(tmp_path / "empty")


def test_the_grid_has_a_named_row_for_each_entry(tmp_path):
    grey = {level: np.full((1, 8, 8), level, np.uint8) for level in (10, 20, 200)}
    draw_grid({"2": np.stack([grey[200]]), "5": np.stack([grey[10], grey[20]])}, tmp_path / "grid.png", cell=16)
    with Image.open(tmp_path / "grid.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[0] == 2 * 20 + 4
    margin = pixels.shape[1] - (2 * 20 + 4)
    assert (pixels[:, :margin] < 128).any()  # the names
    assert pixels[[12, 32]][:, [margin + 8, margin + 28]].tolist() == [[200, 255], [10, 20]]


def test_the_judge_reads_real_digits_and_not_noise():
    images, labels = load_digits()
    assert judge(images, labels).samples > 0.98
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, images.shape).astype(np.uint8)
    verdict = judge(noise, labels)
    assert verdict.samples < 0.3
    assert (verdict.sample_count, verdict.held_out_count, len(verdict.by_class)) == (1797, 450, 10)
    assert verdict.held_out > 0.97


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), np.zeros(2, int)),
        (np.zeros((2, 1, 8, 8)), np.zeros(2, int)),
        (np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, int)),
        (np.zeros((2, 1, 8, 8), np.uint8), np.zeros(3, int)),
        (np.zeros((2, 1, 8, 8), np.uint8), np.array(["0", "1"])),
        (np.zeros((2, 1, 8, 8), np.uint8), np.array([0, 10])),
    ],
)
def test_the_judge_refuses_what_are_no_digits(images, labels):
    with pytest.raises(DataError, match="the samples are|the labels are"):
        judge(images, labels)


def test_the_shares_of_classes_go_by_class():
    images, labels = load_digits()
    few = np.isin(labels, [3, 7])
    assert set(judge(images[few], labels[few]).by_class) == {3, 7}
