"""Encode images into a set of latents: what is stored, any number of processes, and processes that die."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

import xar_scale.data.encode as encode_module
from tests.unit.conftest import read_set, small_info
from tests.unit.encoding import (
    CLASSES,
    PER_CLASS,
    PIXEL,
    SIZE,
    StopError,
    Stopping,
    Told,
    as_rank,
    cropped,
    damage,
    encode,
    files,
    smooth,
    stop,
    tars,
)
from xar_scale.data import decode
from xar_scale.data.encode import ENCODING, PLAN
from xar_scale.data.images import center_crop
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DATASET_FILE
from xar_scale.data.verify import stray_files, verify_set
from xar_scale.errors import ConfigError, DataError, ProcessError, UsageError
from xar_scale.tokenizers.kl16 import KL16Tokenizer
from xar_scale.tokenizers.pixel import PixelTokenizer

# what is stored


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_sample_is_the_encoded_crop_and_its_mirror_image(source, tmp_path, dtype):
    info = encode(tmp_path / "set", source, dtype=dtype)
    samples = read_set(tmp_path / "set")
    assert info == LatentShards(tmp_path / "set").info and info.samples == len(samples) == CLASSES * PER_CLASS
    assert [shard.samples for shard in info.shards] == [5, 5, 5, 5, 1]
    assert (info.classes, info.dtype, info.shape, info.stored) == (CLASSES, dtype, (12, 4, 4), "latents")
    for sample in samples:
        image = cropped(source, sample.key)
        assert sample.label == int(sample.key[1])
        assert np.array_equal(sample.latent, PIXEL.encode(image, dtype)[0]) and sample.latent.dtype == dtype
        assert np.array_equal(sample.flipped, PIXEL.encode(image[..., ::-1], dtype)[0])
        assert not np.array_equal(sample.latent, sample.flipped)
    assert not (tmp_path / "set" / ENCODING).exists()


def test_mirrored_images_can_be_left_out_and_grey_ones_encoded(source, tmp_path):
    grey = PixelTokenizer(patch=4)
    described = {"name": grey.name, **grey.settings}
    info = encode(tmp_path / "set", source, grey, tokenizer=described, flipped=False)
    assert not info.flipped and info.shape == (16, 2, 2) and info.tokenizer == described
    assert all(sample.flipped is None for sample in read_set(tmp_path / "set"))


def test_a_shard_mixes_classes_in_an_order_of_its_own(source, tmp_path):
    encode(tmp_path / "set", source)
    samples = read_set(tmp_path / "set")
    assert [sample.key for sample in samples] != sorted(sample.key for sample in samples)
    for begin in range(0, 20, 5):
        assert len({sample.label for sample in samples[begin : begin + 5]}) > 1


def test_the_set_says_how_its_images_were_prepared(source, tmp_path):
    encode(tmp_path / "set", source, precision="tf32")
    assert LatentShards(tmp_path / "set").info.images == {
        "source": str(source),
        "crop": "adm-center",
        "size": SIZE,
        "precision": "tf32",
        "batch": 2,
        "samples_per_shard": 5,
        "image": "jpg",
        "skipped": [],
    }


def test_readers_and_verification_take_the_set(source, tmp_path):
    encode(tmp_path / "set", source)
    shards = LatentShards(tmp_path / "set")
    assert [fault for _, faults in verify_set(shards, 1) for fault in faults] == [] and stray_files(
        tmp_path / "set", shards.info
    ) == []
    stock = [
        (sample["__key__"], sample["cls"], sample["latent.npy"], sample["flipped.npy"])
        for tar in sorted((tmp_path / "set").glob("*.tar"))
        for sample in wds.WebDataset(str(tar), shardshuffle=False).decode()
    ]
    ours = read_set(tmp_path / "set")
    assert [row[:2] for row in stock] == [(sample.key, sample.label) for sample in ours]
    for (*_, latent, flipped), sample in zip(stock, ours, strict=True):
        assert np.array_equal(latent, sample.latent) and np.array_equal(flipped, sample.flipped)


def test_tars_give_the_samples_of_their_images(tmp_path):
    tars(tmp_path / "tars", [4, 0, 4, 2, 1])
    info = encode(tmp_path / "set", tmp_path / "tars", classes=6)
    assert info.classes == 6
    samples = {sample.key: sample for sample in read_set(tmp_path / "set")}
    for number, label in enumerate([4, 0, 4, 2, 1]):
        sample = samples[f"part-0{number // 3}-s0{number}"]
        image = np.asarray(smooth(8, 8, number)).transpose(2, 0, 1)[None]
        assert sample.label == label and np.array_equal(sample.latent, PIXEL.encode(image)[0])


def test_kl16_stores_its_moments_and_what_a_dtype_cannot_hold_is_that_images_fault(source, tmp_path, kl16, monkeypatch):
    few = tmp_path / "few"
    for name in ("n0/i00.jpg", "n0/i03.jpg", "n1/i01.jpg"):
        (few / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, few / name)
    changes = {"tokenizer": {"name": kl16.name, **kl16.settings}, "size": 16}
    info = encode(tmp_path / "set", few, kl16, **changes)
    assert (info.stored, info.shape, info.latent_scale) == ("moments", (32, 1, 1), 0.2325)
    samples = {sample.key: sample for sample in read_set(tmp_path / "set")}
    assert len(samples) == 3
    for key, sample in samples.items():
        with Image.open(few / f"{key.replace('-', '/')}.jpg") as image:
            pixels = np.asarray(center_crop(image.convert("RGB"), 16)).transpose(2, 0, 1)[None]
        assert np.array_equal(sample.latent, kl16.encode(pixels)[0])
        assert np.array_equal(sample.flipped, kl16.encode(pixels[..., ::-1])[0])

    seen, moments = [], kl16.moments

    def overflowing(images):
        found = moments(images)
        seen.append(len(images))
        if sum(seen[1:]) <= 2 and len(seen) > 1:  # the first batch after the blank image
            found[1, 3] = 1e5
        return found

    monkeypatch.setattr(kl16, "moments", overflowing)
    told = Told()
    info = encode(tmp_path / "lossy", few, kl16, max_bad=1, reporter=told, **changes)
    [name] = info.images["skipped"]
    assert info.samples == 2 and name.removesuffix(".jpg").replace("/", "-") not in {
        s.key for s in read_set(tmp_path / "lossy")
    }
    assert f"skipped {few / name}: its moments are not finite in float16" in told.lines
    for sample in read_set(tmp_path / "lossy"):
        assert np.array_equal(sample.latent, samples[sample.key].latent)
    seen.clear()
    assert encode(tmp_path / "wide", few, kl16, dtype="float32", **changes).samples == 3


def test_kl16_takes_several_images_a_pass_and_computes_in_bf16_where_told(kl16, kl16_weights):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    one = kl16.encode(images, "float32")
    many = KL16Tokenizer(kl16_weights, batch=2, compute=torch.bfloat16)
    sizes = []
    many.network.encoder.register_forward_hook(lambda *call: sizes.append((len(call[-1]), call[-1].dtype)))
    mixed = many.encode(images, "float32")
    assert sizes == [(2, torch.bfloat16), (1, torch.bfloat16)] and mixed.dtype == np.float32
    assert 0 < np.abs(mixed - one).max() < 0.1 * np.abs(one).max()
    many.compute = torch.float32
    np.testing.assert_allclose(many.encode(images, "float32"), one, rtol=1e-4, atol=1e-4)


def test_a_size_that_does_not_fit_the_tokenizer_is_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(ConfigError, match="9x9 pixels do not fit"):
        encode(tmp_path / "set", source, size=9)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("where", [".", "set", "n0/deep/set", "../link"])
def test_a_set_is_not_made_in_its_source(source, tmp_path, where):
    copy, before = shutil.copytree(source, tmp_path / "copy"), files(source)
    (tmp_path / "link").symlink_to(copy)
    with pytest.raises(UsageError, match=f"^{copy / where} is the source {copy}, or inside it: write elsewhere$"):
        encode(copy / where, copy)
    assert files(copy) == before and encode(tmp_path / "copy-set", copy).samples == CLASSES * PER_CLASS


def test_a_description_that_kl16_cannot_bear_is_refused(source, tmp_path):
    with pytest.raises(DataError, match="tokenizer kl16: its latents have 16 channels, not 12"):
        encode(tmp_path / "set", source, tokenizer={"name": "kl16", "sha256": "0" * 64})
    assert not (tmp_path / "set").exists()


# any number of processes


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_processes_changes_no_byte(source, tmp_path, whole, monkeypatch, world, workers):
    out = tmp_path / "set"
    as_rank(monkeypatch, 0, 1)
    with pytest.raises(StopError):  # makes the plan
        encode(out, source, Stopping(0))
    for rank in reversed(range(world)):
        as_rank(monkeypatch, rank, world)
        info = encode(out, source, workers=workers)
        assert (info is not None) == (rank == 0)
    assert files(out) == whole
    as_rank(monkeypatch, world - 1, world)  # a rank that starts late
    assert encode(out, source).samples == CLASSES * PER_CLASS


def test_rank_0_waits_for_the_others_and_they_for_its_plan(source, tmp_path, whole, monkeypatch):
    out, told = tmp_path / "set", {0: Told(), 1: Told()}
    monkeypatch.setattr(encode_module.dist, "world", lambda: 2)
    monkeypatch.setattr(encode_module.dist, "rank", lambda: int(threading.current_thread().name))
    monkeypatch.setattr(encode_module, "POLL_S", 0.05)
    ranks = {
        rank: threading.Thread(target=encode, args=(out, source), kwargs={"reporter": told[rank]}, name=str(rank))
        for rank in (1, 0)
    }
    ranks[1].start()
    time.sleep(0.3)
    assert told[1].lines == [f"waiting for rank 0 to list the images of {source} in {out / ENCODING / PLAN}"]
    assert not out.exists()
    ranks[0].start()
    for thread in ranks.values():
        thread.join(timeout=400)
    assert files(out) == whole
    assert told[0].steps[-1] == (21, 21, 0) and [step[0] for step in told[0].steps] == sorted(s[0] for s in told[0].steps)


def test_rank_0_says_what_it_waits_for(source, tmp_path, whole, monkeypatch):
    out, told = tmp_path / "set", Told()
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setattr(encode_module.time, "sleep", stop)
    with pytest.raises(StopError):
        encode(out, source, reporter=told)
    assert told.lines[-1] == "waiting for 2 shards of other ranks, the first latents-000001"
    assert not (out / DATASET_FILE).exists()


class OthersFinishNow(Told):
    """Once rank 0 of two has encoded its 11 images, rank 1 records its own, with a larger budget of bad images."""

    def __init__(self, monkeypatch, out, source):
        super().__init__()
        self.monkeypatch, self.out, self.source = monkeypatch, out, source
        as_rank(monkeypatch, 0, 2)

    def progress(self, *numbers):
        super().progress(*numbers)
        if numbers[0] == 11 and self.steps.count(numbers) == 1:
            as_rank(self.monkeypatch, 1, 2)
            encode(self.out, self.source, max_bad=3)


def test_rank_0_reports_what_the_others_record_last(source, tmp_path, whole, monkeypatch):
    told = OthersFinishNow(monkeypatch, tmp_path / "set", source)
    encode(tmp_path / "set", source, reporter=told)
    assert told.steps[-1] == (21, 21, 0) and files(tmp_path / "set") == whole


def test_bad_images_that_the_others_record_last_are_held_to_the_budget(source, tmp_path, monkeypatch):
    with pytest.raises(StopError):
        encode(tmp_path / "stopped", source, Stopping(0))
    name = json.loads((tmp_path / "stopped" / ENCODING / PLAN).read_text())["images"][5][0]  # in the first shard of rank 1
    copy = damage(source, tmp_path / "copy", name)
    with pytest.raises(DataError, match="1 bad images, --max-bad allows 0"):
        encode(tmp_path / "set", copy, reporter=OthersFinishNow(monkeypatch, tmp_path / "set", copy))
    assert not (tmp_path / "set" / "dataset.json").exists()


@pytest.mark.parametrize(("rank", "world"), [(4, 4), (-1, 2)])
def test_ranks_that_are_counted_from_1_are_refused(source, tmp_path, monkeypatch, rank, world):
    as_rank(monkeypatch, rank, world)
    with pytest.raises(UsageError, match=f"RANK {rank} is not from 0 to WORLD_SIZE - 1, WORLD_SIZE is {world}"):
        encode(tmp_path / "set", source)


# processes that decode


def test_a_decoder_that_dies_ends_it_in_one_line(source, tmp_path, whole, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(decode, "load_image", die)
    with pytest.raises(ProcessError, match=r"a data worker died: .*run the same command again to resume") as caught:
        encode(tmp_path / "set", source, workers=1)
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.undo()
    encode(tmp_path / "set", source, workers=1)
    assert files(tmp_path / "set") == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decoder_without_memory_is_no_bad_image(source, tmp_path, monkeypatch, workers):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "load_image", full)
    with pytest.raises(ProcessError, match="^out of memory while decoding$"):
        encode(tmp_path / "set", source, workers=workers, max_bad=100)


def test_a_device_without_memory_and_other_failures_are_what_they_are(source, tmp_path):
    tokenizer = Stopping(2)
    tokenizer.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ConfigError, match="batch 2: not enough device memory for that many images per forward pass"):
        encode(tmp_path / "set", source, tokenizer)
    tokenizer = Stopping(2)
    tokenizer.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        encode(tmp_path / "set", source, tokenizer)


def test_how_images_were_made_is_no_part_of_which_samples_a_set_has():
    info = small_info()
    assert (
        info.fingerprint == "0faa5968a5a9b0de57c018dfcf3b190a9790a421918582a731d7dcc6e76506eb"
    )  # from before images were recorded
    assert replace(info, images={"size": 256}).fingerprint == info.fingerprint
    assert replace(info, classes=11).fingerprint != info.fingerprint
