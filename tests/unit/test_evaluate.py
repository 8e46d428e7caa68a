"""Images from checkpoints, the grid, and the judge's complaints."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from tests.conftest import digits_config
from tests.unit.tiny_run import CONFIG, INFO, Run
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import verify
from xar_scale.config import KernelConfig
from xar_scale.data.loader import LatentDataset
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DatasetInfo, ShardWriter
from xar_scale.errors import ConfigError, DataError, UsageError
from xar_scale.evaluate.digits import frechet_distance, judge, load_digits
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


def test_images_of_the_autoencoder_through_data_training_and_sampling(tmp_path, kl16, kl16_weights):
    """Encoded, written, read as batches, trained on, drawn and decoded: 64x64 pixels as 4x4 tokens of 16 channels."""
    photos = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)
    info = DatasetInfo(
        tokenizer={"name": kl16.name, **kl16.settings},
        latent_scale=kl16.latent_scale,
        stored="moments",
        shape=(32, 4, 4),
        dtype="float16",
        classes=10,
        flipped=True,
    )
    with ShardWriter(tmp_path / "data", info) as writer:
        stored = zip(kl16.encode(photos), kl16.encode(photos[..., ::-1]), strict=True)
        for number, (moments, flipped) in enumerate(stored):
            writer.add(f"s{number}", number, moments, flipped)
    config = digits_config("train.engine=single", "model.width=16", "model.heads=2", "model.channels=16", "data.flip=true")
    shards = LatentShards(tmp_path / "data")
    run = Run(tmp_path / "run", config=config, info=shards.info)
    dataset = LatentDataset(shards, config, XAR(config.model).layout)
    run.train(2, lambda step: dataset.__getitems__(list(range(8 * step, 8 * step + 8))))
    checkpoint = verify(run.save())

    settings = dataclasses.replace(SETTINGS, tokenizer_weights=str(kl16_weights))
    images = generate(checkpoint, [3, 7], settings, seed=4, device=CPU)
    model = XAR(config.model)
    model.load_state_dict(load_weights(checkpoint, "ema"))
    latents = sample(model, [3, 7], steps=2, guidance=1.5, sampler="euler", seed=4)
    assert images.shape == (2, 3, 64, 64) and images.dtype == np.uint8
    assert np.array_equal(images, kl16.decode(latents / 0.2325))
    assert not np.array_equal(images, kl16.decode(latents))
    with pytest.raises(ConfigError, match="needs its weights"):
        generate(checkpoint, [3, 7], SETTINGS, seed=4, device=CPU)


def test_the_tokenizer_is_told_weights_and_device(checkpoint, monkeypatch):
    told = []

    def create(*arguments):
        told.append(arguments)
        return PixelTokenizer()

    monkeypatch.setattr("xar_scale.evaluate.generate.create_tokenizer", create)
    generate(checkpoint, [3], dataclasses.replace(SETTINGS, tokenizer_weights="kl16.ckpt"), seed=0, device=CPU)
    assert told == [(INFO.tokenizer, "kl16.ckpt", CPU)]


def test_a_checkpoint_from_before_there_were_tokenizer_weights(checkpoint):
    config = {**checkpoint.manifest.config, "sample": dict(checkpoint.manifest.config["sample"])}
    del config["sample"]["tokenizer_weights"]
    older = dataclasses.replace(checkpoint, manifest=dataclasses.replace(checkpoint.manifest, config=config))
    images = generate(older, [3], SETTINGS, seed=0, device=CPU)
    assert np.array_equal(images, generate(checkpoint, [3], SETTINGS, seed=0, device=CPU))


def test_the_kernels_named_are_used_and_said(checkpoint, capsys):
    images = generate(checkpoint, [3, 5], SETTINGS, 0, CPU, KernelConfig(attention="flex"))
    assert "2 images on cpu; attention flex" in capsys.readouterr().out
    expected = generate(checkpoint, [3, 5], SETTINGS, 0, CPU)
    assert "attention dense" in capsys.readouterr().out
    assert np.abs(images.astype(int) - expected).max() <= 1


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


def test_the_frechet_distance_is_that_of_gaussians():
    real, _ = load_digits()
    assert frechet_distance(real) == pytest.approx(0, abs=1e-3)
    shifted = np.clip(real.astype(int) + 17, 0, 255).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (500, 1, 8, 8), dtype=np.uint8)
    features = [images.reshape(len(images), -1) * (16 / 255) for images in (noise, real)]
    means, covariances = [f.mean(0) for f in features], [np.cov(f, rowvar=False) for f in features]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(noise) == pytest.approx(expected, rel=1e-6)
    assert 1 < frechet_distance(shifted) < frechet_distance(noise)


def test_the_frechet_distance_of_few_images_is_a_number():
    """Their covariance is singular, and rounding makes eigenvalues of 0 negative."""
    real, _ = load_digits()
    assert 1 < frechet_distance(real[:10]) < 1000


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
