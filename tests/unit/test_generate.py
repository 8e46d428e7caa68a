"""Images generated from weights on disk: which weights they use, and what they do and do not depend on."""

import dataclasses
import errno
import functools
import os
import shutil
import threading

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from tests.conftest import digits_config
from tests.unit.foreign_checkpoints import published as as_published
from tests.unit.foreign_checkpoints import reshard
from tests.unit.tiny_run import CONFIG, INFO, Run
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import Checkpoint, read_manifest, verify
from xar_scale.data.loader import LatentDataset
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DatasetInfo, ShardWriter
from xar_scale.errors import ConfigError, DataError, FileError, NonFiniteError, UsageError
from xar_scale.evaluate import generate
from xar_scale.evaluate import trained as trained_module
from xar_scale.evaluate.generate import Generator, open_generator, prepare
from xar_scale.evaluate.trained import holds_weights, open_trained
from xar_scale.files import write_atomically
from xar_scale.model.xar import XAR, create_model
from xar_scale.presets import MODELS
from xar_scale.sampler import sample
from xar_scale.tokenizers.pixel import PixelTokenizer

CPU = torch.device("cpu")
SIZES = {"grid": (4, 4), "channels": 4, "classes": 10}
FEW = ["sample.sampler=euler", "sample.steps=2", "sample.guidance=1.5", "sample.batch=64"]


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    run = Run(tmp_path / "run")
    run.train(5)
    return verify(run.save())


def generator(path, *overrides: str) -> Generator:
    return open_generator(open_trained(path, [*FEW, *overrides]), CPU)


def test_images_are_sampled_from_the_ema_weights(checkpoint):
    images = generator(checkpoint.path).draw([3, 7], 4)
    expected = {}
    for which in ("ema", "model"):
        model = XAR(CONFIG.model)
        model.load_state_dict(load_weights(checkpoint, which))
        latents = sample(model, [3, 7], steps=2, guidance=1.5, sampler="euler", seed=4)
        expected[which] = PixelTokenizer().decode(latents)
    assert images.shape == (2, 1, 8, 8) and images.dtype == np.uint8
    assert np.array_equal(images, expected["ema"])
    assert not np.array_equal(images, expected["model"])


def test_linear_layers_hold_weights_in_16_bits_and_draw_what_autocast_draws():
    plain, prepared = create_model("nano", **SIZES), create_model("nano", **SIZES)
    prepare(prepared, CPU, torch.bfloat16, compiled=False)
    assert {parameter.dtype for parameter in prepared.blocks[0].parameters()} == {torch.bfloat16}
    assert prepared.encoder_pos.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn, expected = (sample(model, [3, 7], steps=3, guidance=1.5, seed=4) for model in (prepared, plain))
    assert torch.equal(drawn, expected)


def test_blocks_are_compiled_for_sampling_if_requested(checkpoint, monkeypatch, capsys):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
    images = [generator(checkpoint.path, f"kernels.compile={word}").draw([3, 7], 4).astype(int) for word in ("false", "true")]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert capsys.readouterr().out.count(", blocks compiled\n") == 1
    assert counted.frame_count == 7  # four cells: each alone, and each but the first together with the one before


def test_kinds_of_calls_are_compiled_beyond_pytorch_s_limit(checkpoint, monkeypatch):
    """A smaller last batch, and steps outside the guidance interval, need more graphs than PyTorch's limit of 8."""
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
    own = ("sample.batch=2", "sample.steps=6", "sample.guidance_interval=[0.2,0.8]")
    images = [generator(checkpoint.path, *own, f"kernels.compile={word}").draw([3, 7, 4], 4) for word in ("false", "true")]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
    assert counted.frame_count == 20


class UngraphedCalls:
    """Stands for CUDA graphs, which need a GPU: computes each call."""

    def __init__(self, device) -> None:
        self.kinds = set()

    def run(self, kind, work, *inputs):
        self.kinds.add((kind, inputs[0].shape))
        return work(*inputs)


def test_batches_of_any_size_share_the_cache_of_the_graphs(monkeypatch):
    monkeypatch.setattr(generate, "Graphs", UngraphedCalls)
    graphed = generate._GraphedNetwork(model := create_model("nano", **SIZES).eval(), CPU)
    plain, made = create_model("nano", **SIZES), []
    model.forward, model.new_cache = graphed.forward, lambda *of: made.append(graphed.new_cache(*of)) or made[-1]
    for labels, graphs in (([3, 7], 7), ([5], 14), ([1, 2, 3], 7), ([4, 6], 14)):
        options = {"steps": 3, "guidance": 1.5, "seed": len(labels)}
        assert torch.equal(sample(model, labels, **options), sample(plain, labels, **options))
        assert len(graphed._graphs.kinds) == graphs  # a larger cache is a new one: graphs of the old one are freed
    sizes = [len(cache[0].keys) for cache in made]
    assert sizes == [4, 4, 6, 6] and made[0] is made[1] and made[2] is made[3]


def test_images_do_not_depend_on_their_batch(checkpoint):
    labels = [number % 10 for number in range(64)]
    together = generator(checkpoint.path).draw(labels, 0)
    alone = generator(checkpoint.path, "sample.batch=1").draw(labels, 0)
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert len(np.unique(together.reshape(64, -1), axis=0)) == 64
    part = generator(checkpoint.path).draw(labels[40:43], 0, first=40)
    assert np.abs(together[40:43].astype(int) - part).max() <= 1


def test_an_image_with_its_own_seed_does_not_depend_on_its_position(checkpoint):
    drawing = generator(checkpoint.path)
    images = drawing.draw([3, 7, 3], [5, 5, 6])
    assert np.abs(images[1].astype(int) - drawing.draw([7], [5])[0]).max() <= 1
    assert np.abs(images[1].astype(int) - drawing.draw([7], 5)[0]).max() <= 1  # that is xs.sample(..., seed=5)
    assert np.abs(images[0].astype(int) - images[2]).max() > 20
    assert np.array_equal(drawing.draw_over_ranks([3, 7, 3], [5, 5, 6]), images)


def test_extra_batches_change_nothing(checkpoint):
    """The ranks of a sharding group run them."""
    drawing = generator(checkpoint.path, "sample.batch=2")
    calls = []
    drawing.model.register_forward_hook(lambda *_: calls.append(1))
    images = drawing.draw([1, 2, 3], 0)
    passes = len(calls)
    assert np.array_equal(drawing.draw([1, 2, 3], 0, batches=4), images) and len(calls) == 3 * passes
    assert len(drawing.draw([], 0, batches=2)) == 0 and len(calls) == 4 * passes


def test_a_nan_image_is_refused_after_all_batches_have_run(checkpoint):
    drawing = generator(checkpoint.path, "sample.batch=1")
    calls = []

    def break_the_second(model, inputs, velocity):
        calls.append(1)
        return velocity * float("nan") if len(calls) == 9 else velocity  # an image has four entities of two steps

    drawing.model.register_forward_hook(break_the_second)
    with pytest.raises(NonFiniteError, match="1 of 1 images are NaN or infinite"):
        drawing.draw([1, 2, 3, 4, 5], 0, batches=6)
    assert len(calls) == 6 * 8


def test_settings_can_be_changed_without_a_new_generator(checkpoint):
    other = ["sample.sampler=heun", "sample.steps=3", "sample.guidance=2.0"]
    drawing, trained = generator(checkpoint.path, "sample.batch=2"), open_trained(checkpoint.path, other)
    changed = drawing.with_settings(trained.sample)
    assert np.array_equal(changed.draw([1, 2, 3], 0), generator(checkpoint.path, "sample.batch=2", *other).draw([1, 2, 3], 0))
    assert changed.model is drawing.model and changed.settings.batch == 2 and drawing.settings.steps == 2


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_frames_show_an_image_being_denoised(checkpoint, monkeypatch, sampler):
    monkeypatch.setattr("xar_scale.evaluate.generate.FRAMES", 12)
    drawing = generator(checkpoint.path, "sample.steps=6", f"sample.sampler={sampler}")
    frames = [*drawing.frames(3, 5)]
    assert len(frames) == 4 * 3 + 1 and np.array_equal(frames[-1], drawing.draw([3], [5])[0])
    corners = [frame[0, 4:, 4:] for frame in frames]  # the last cell: flat until it starts
    assert all(np.ptp(corner) == 0 for corner in corners[:9]) and np.ptp(corners[9]) > 20
    first = [frame[0, :4, :4] for frame in frames]
    assert all(np.array_equal(cell, first[-1]) for cell in first[3:]) and not np.array_equal(first[0], first[-1])
    monkeypatch.setattr("xar_scale.evaluate.generate.FRAMES", 2)  # fewer than entities
    assert len([*drawing.frames(3, 5)]) == 3


def test_16_bits_are_near_32(checkpoint):
    exact = generator(checkpoint.path).draw([1, 2, 3], 0).astype(int)
    near = generator(checkpoint.path, "sample.precision=bf16").draw([1, 2, 3], 0)
    assert 0 < np.abs(exact - near).max() < 40


def test_images_of_the_autoencoder_through_data_training_and_sampling(tmp_path, kl16, kl16_weights):
    """Encode, write, read as batches, train, sample and decode: 64x64 pixels as 4x4 tokens of 16 channels."""
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

    images = generator(checkpoint.path, f"sample.tokenizer_weights={kl16_weights}").draw([3, 7], 4)
    model = XAR(config.model)
    model.load_state_dict(load_weights(checkpoint, "ema"))
    latents = sample(model, [3, 7], steps=2, guidance=1.5, sampler="euler", seed=4)
    assert images.shape == (2, 3, 64, 64) and images.dtype == np.uint8
    assert np.array_equal(images, kl16.decode(latents / 0.2325))
    assert not np.array_equal(images, kl16.decode(latents))
    with pytest.raises(ConfigError, match="needs its weights"):
        generator(checkpoint.path)


def test_published_weights_are_sampled_with_their_recipe(tmp_path, kl16_weights, monkeypatch):
    """Their file has neither config nor tokenizer."""
    sizes = dict(width=32, depth_encoder=1, depth_decoder=1, heads=2)
    monkeypatch.setitem(MODELS, "xar_b", sizes)
    model = create_model("xar_b", seed=3, grid=(16, 16), channels=16, classes=1000)
    published = tmp_path / "xAR-B.pth"
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = as_published(weights, model.config)
    torch.save({"model": state, "model_ema": {name: 1.5 * value for name, value in state.items()}}, published)
    assert holds_weights(published)
    with pytest.raises(ConfigError, match=r"set sample.tokenizer_weights to the path of kl16.ckpt"):
        open_trained(published, [])
    trained = open_trained(published, [f"sample.tokenizer_weights={kl16_weights}", "sample.steps=3"])
    assert (trained.kind, trained.sample.steps, trained.sample.guidance, trained.latent_scale) == ("ema", 3, 2.7, 0.2325)
    drawing = open_generator(trained, CPU)
    assert torch.equal(drawing.model.in_proj.weight, 1.5 * weights["in_proj.weight"])
    assert drawing.draw([207], 1).shape == (1, 3, 256, 256)


def test_the_tokenizer_gets_weights_and_device(checkpoint, monkeypatch):
    told = []

    def create(*arguments, **more):
        told.append((*arguments, more))
        return PixelTokenizer()

    monkeypatch.setattr("xar_scale.evaluate.generate.create_tokenizer", create)
    generator(checkpoint.path, "sample.tokenizer_weights=kl16.ckpt")
    assert told == [(INFO.tokenizer, "kl16.ckpt", CPU, {"batch": 1})]


def test_a_checkpoint_from_before_there_were_tokenizer_weights(checkpoint):
    images = generator(checkpoint.path).draw([3], 0)
    config = {**checkpoint.manifest.config, "sample": dict(checkpoint.manifest.config["sample"])}
    del config["sample"]["tokenizer_weights"]
    older = dataclasses.replace(checkpoint.manifest, config=config)
    write_atomically(checkpoint.path / "manifest.json", older.to_json())
    assert np.array_equal(generator(checkpoint.path).draw([3], 0), images)


def test_the_kernels_named_are_used_and_logged(checkpoint, capsys):
    images = generator(checkpoint.path, "kernels.attention=flex").draw([3, 5], 0)
    assert "sampling on 1 x cpu, tf32; attention flex" in capsys.readouterr().out
    expected = generator(checkpoint.path).draw([3, 5], 0)
    assert "attention dense" in capsys.readouterr().out
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_what_cannot_be_sampled_from_is_refused(tmp_path, checkpoint):
    with pytest.raises(UsageError, match=r"train.steps=3: only sample.\* and kernels.\* can be changed in sampling"):
        open_trained(checkpoint.path, ["train.steps=3"])
    with pytest.raises(ConfigError, match="world 1 is not divisible by sample.shard_ranks 2"):
        generator(checkpoint.path, "sample.shard_ranks=2")
    with pytest.raises(UsageError, match="no checkpoint at"):
        open_trained(tmp_path / "nowhere", [])
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="no checkpoint in"):
        open_trained(tmp_path / "empty", [])
    spoilt = next(checkpoint.path.glob("*.safetensors"))
    content = bytearray(spoilt.read_bytes())
    content[-5] ^= 1
    spoilt.write_bytes(content)
    with pytest.raises(DataError, match="is corrupt"):
        open_trained(checkpoint.path, [])


def test_a_run_stands_for_its_newest_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.save()
    run.train()
    newest = run.save()
    by_run, by_checkpoint = open_trained(tmp_path, []), open_trained(newest, [])
    assert by_run.source.path == by_checkpoint.source.path == newest and by_run.sha256 == by_checkpoint.sha256
    assert by_run.sha256 != open_trained(tmp_path / "checkpoints" / "step-00000000", []).sha256


def test_a_run_that_drops_the_checkpoint_that_was_opened_stops_no_sampling(checkpoint):
    expected = generator(checkpoint.path).draw([3], 4)
    trained = open_trained(checkpoint.path, FEW)
    shutil.rmtree(checkpoint.path)
    assert np.array_equal(open_generator(trained, CPU).draw([3], 4), expected)


def test_a_checkpoint_that_is_gone_before_it_is_opened_ends_all_ranks_alike(checkpoint, monkeypatch):
    """A raw OSError would end the one rank that meets it, while the others wait for it."""

    def gone(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr(trained_module, "open_source", gone)
    with pytest.raises(FileError, match=f"{checkpoint.path}: No such file"):
        open_trained(checkpoint.path, [])


def test_a_checkpoint_converted_from_another_format_is_refused(tmp_path):
    run = Run(tmp_path / "run")
    run.save()
    assert reshard(tmp_path / "run", tmp_path / "universal", "--to", "universal") == 0
    assert reshard(tmp_path / "universal", tmp_path / "made", "--to", "xar-scale") == 0
    assert not read_manifest(tmp_path / "made").manifest.config
    with pytest.raises(UsageError, match="was converted from another format: it has neither a model config nor a tokenizer"):
        open_trained(tmp_path / "made", [])


def test_a_batch_is_decoded_while_the_next_is_sampled(checkpoint):
    drawing, second, waited = generator(checkpoint.path, "sample.batch=2"), threading.Event(), []
    calls = []

    def count(*_) -> None:
        calls.append(1)
        if len(calls) > 8:  # a batch has four entities of two steps
            second.set()

    class Slow(PixelTokenizer):
        def decode(self, latents):
            waited.append(second.wait(20))  # for a forward pass of the second batch
            return super().decode(latents)

    drawing.model.register_forward_hook(count)
    images = dataclasses.replace(drawing, tokenizer=Slow()).draw([1, 2, 3, 4], 0)
    assert waited == [True, True] and np.array_equal(images, drawing.draw([1, 2, 3, 4], 0))


def test_a_folder_with_weights_and_an_image_holds_weights(tmp_path):
    assert holds_weights(tmp_path / "nowhere.pth") and not holds_weights(tmp_path / "x.npz")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "teaser.png").write_bytes(b"")
    assert not holds_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert holds_weights(tmp_path)
