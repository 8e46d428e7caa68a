"""Images into a set of latents: what is stored, and that neither processes nor interruptions change a byte of it."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

import xar_scale.data.encode as encode_module
from tests.unit.conftest import read_set, small_info, write_set
from tests.unit.test_images import smooth, tars
from xar_scale.data.encode import PLAN, WORK, EncodeSettings, Watcher, encode_set
from xar_scale.data.images import center_crop
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DATASET_FILE
from xar_scale.data.verify import stray_files, verify_set
from xar_scale.errors import ConfigError, DataError, ProcessError, UsageError, XarScaleError
from xar_scale.tokenizers.kl16 import KL16Tokenizer
from xar_scale.tokenizers.pixel import PixelTokenizer

SIZE, CLASSES, PER_CLASS = 8, 3, 7
PIXEL = PixelTokenizer(patch=2, image_channels=3)


class Told(Watcher):
    def __init__(self):
        self.lines, self.steps = [], []

    def say(self, line):
        self.lines.append(line)

    def progress(self, *numbers):
        self.steps.append(numbers)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(CLASSES * PER_CLASS):
        folder = root / f"n{number % CLASSES}"
        folder.mkdir(exist_ok=True)
        smooth(20 + number, 33 - number, number).save(folder / f"i{number:02d}.jpg")
    return root


def settings_of(source, **changes) -> EncodeSettings:
    values = {
        "source": str(source),
        "tokenizer": {"name": PIXEL.name, **PIXEL.settings},
        "size": SIZE,
        "dtype": "float16",
        "flipped": True,
        "precision": "fp32",
        "batch": 2,
        "samples_per_shard": 5,
        "classes": None,
        "image": "jpg",
    }
    return EncodeSettings(**(values | changes))


def encode(out, source, using=PIXEL, *, workers=0, max_bad=0, watcher=None, **changes):
    watcher = Told() if watcher is None else watcher
    return encode_set(out, settings_of(source, **changes), using, workers=workers, max_bad=max_bad, watcher=watcher)


def as_rank(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def whole(source, tmp_path_factory):
    """The files of the set that an uninterrupted process makes."""
    out = tmp_path_factory.mktemp("whole") / "set"
    encode(out, source)
    return files(out)


def damage(source: Path, to: Path, *names: str) -> Path:
    """A copy of the source whose named images are cut."""
    shutil.copytree(source, to)
    for name in names:
        content = (to / name).read_bytes()
        (to / name).write_bytes(content[: len(content) // 2])
    return to


class StopError(Exception):
    """Where a test stops the work."""


def stop(*_):
    raise StopError


class Stopping:
    """The pixel tokenizer until it has encoded ``passes`` batches, the blank image aside."""

    def __init__(self, passes):
        self.left, self.error = passes + 1, StopError()

    def __getattr__(self, name):
        return getattr(PIXEL, name)

    def encode(self, images, dtype, *, strict):
        if not self.left:
            raise self.error
        self.left -= 1
        return PIXEL.encode(images, dtype, strict=strict)


# what is stored


def cropped(source, key: str) -> np.ndarray:
    with Image.open(source / f"{key.replace('-', '/')}.jpg") as image:
        return np.asarray(center_crop(image.convert("RGB"), SIZE)).transpose(2, 0, 1)[None]


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
    assert not (tmp_path / "set" / WORK).exists()


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
    assert [fault for _, faults in verify_set(shards, 1) for fault in faults] == [] and stray_files(shards) == []
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
        if sum(seen[1:]) <= 2 and len(seen) > 1:  # the first batch behind the blank image
            found[1, 3] = 1e5
        return found

    monkeypatch.setattr(kl16, "moments", overflowing)
    told = Told()
    info = encode(tmp_path / "lossy", few, kl16, max_bad=1, watcher=told, **changes)
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


# any number of processes


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_processes_changes_no_byte(source, tmp_path, whole, monkeypatch, world, workers):
    out = tmp_path / "set"
    as_rank(monkeypatch, 0, 1)
    with pytest.raises(StopError):  # who makes the plan
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
        rank: threading.Thread(target=encode, args=(out, source), kwargs={"watcher": told[rank]}, name=str(rank))
        for rank in (1, 0)
    }
    ranks[1].start()
    time.sleep(0.3)
    assert told[1].lines == [f"waiting for rank 0 to list the images of {source} in {out / WORK / PLAN}"]
    assert not out.exists()
    ranks[0].start()
    for thread in ranks.values():
        thread.join(timeout=60)
    assert files(out) == whole
    assert told[0].steps[-1] == (21, 21, 0) and [step[0] for step in told[0].steps] == sorted(s[0] for s in told[0].steps)


def test_rank_0_says_what_it_waits_for(source, tmp_path, whole, monkeypatch):
    out, told = tmp_path / "set", Told()
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setattr(encode_module.time, "sleep", stop)
    with pytest.raises(StopError):
        encode(out, source, watcher=told)
    assert told.lines[-1] == "waiting for 2 shards of other ranks, the first latents-000001"
    assert not (out / DATASET_FILE).exists()


@pytest.mark.parametrize(("rank", "world"), [(4, 4), (-1, 2)])
def test_ranks_that_are_counted_from_1_are_refused(source, tmp_path, monkeypatch, rank, world):
    as_rank(monkeypatch, rank, world)
    with pytest.raises(UsageError, match=f"RANK {rank} is not one of WORLD_SIZE {world}, which count from 0"):
        encode(tmp_path / "set", source)


# interruptions


@pytest.mark.parametrize("passes", [0, 1, 5, 6, 7, 12, 25])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(source, tmp_path, whole, passes):
    out = tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, source, Stopping(passes))
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(done) == passes // 6  # passes a shard: three batches and their mirror images
    encode(out, source)
    assert files(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done


def test_stopped_again_and_again_in_other_numbers_of_processes(source, tmp_path, whole, monkeypatch):
    out, generator = tmp_path / "set", np.random.default_rng(0)
    for _ in range(12):
        world = int(generator.integers(1, 4))
        as_rank(monkeypatch, 0 if not out.exists() else int(generator.integers(world)), world)
        monkeypatch.setattr(encode_module.time, "sleep", stop)
        try:
            encode(out, source, Stopping(int(generator.integers(9))))
        except StopError:
            continue
    as_rank(monkeypatch, 0, 1)
    encode(out, source)
    assert files(out) == whole


def test_a_shard_without_a_record_is_made_again(source, tmp_path, whole):
    out = tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, source, Stopping(20))
    (out / WORK / "latents-000001.json").unlink()
    (out / "latents-000001.tar").write_bytes(whole["latents-000001.tar"][:1000])
    (out / "latents-000001.index.json").unlink()
    (out / "latents-000002.tar.tmp").write_bytes(b"half")
    encode(out, source)
    (out / "latents-000002.tar.tmp").unlink(missing_ok=True)
    assert files(out) == whole


def test_a_record_is_written_behind_what_it_speaks_of(source, tmp_path, whole, monkeypatch):
    out = tmp_path / "set"
    monkeypatch.setattr(encode_module, "sync_folder", stop)  # between the two
    with pytest.raises(StopError):
        encode(out, source)
    assert files(out).keys() == {"latents-000000.tar", "latents-000000.index.json", f"{WORK}/{PLAN}", f"{WORK}/ended-rank-0"}
    monkeypatch.undo()
    encode(out, source)
    assert files(out) == whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 16}, "size 8, this is size 16"),
        ({"dtype": "float32"}, "dtype 'float16', this is dtype 'float32'"),
        ({"flipped": False}, "flipped True, this is flipped False"),
        ({"precision": "bf16"}, "precision 'fp32', this is precision 'bf16'"),
        ({"batch": 4}, "batch 2, this is batch 4"),
        ({"samples_per_shard": 6}, "samples_per_shard 5, this is samples_per_shard 6"),
        ({"classes": 4}, "classes None, this is classes 4"),
        ({"image": "png"}, "image 'jpg', this is image 'png'"),
        ({"tokenizer": {"name": "pixel", "patch": 4}, "size": 16}, "tokenizer {'name': 'pixel', 'patch': 2, .* this is"),
    ],
)
def test_other_settings_are_refused_with_both_values(source, tmp_path, changes, says):
    out = tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, source, Stopping(7))
    with pytest.raises(UsageError, match=f"{out} was begun with {says}"):
        encode(out, source, **changes)
    encode(out, source)
    before = files(out)
    with pytest.raises(UsageError, match=f"{out} already holds a data set"):
        encode(out, source, **changes)
    assert files(out) == before and encode(out, source).samples == 21


def test_a_crash_behind_the_description_leaves_nothing_behind(source, tmp_path, whole, monkeypatch):
    out = tmp_path / "set"
    monkeypatch.setattr(encode_module, "_clear", stop)
    with pytest.raises(StopError):
        encode(out, source)
    assert (out / WORK).exists()
    monkeypatch.undo()
    assert encode(out, source).samples == 21
    assert files(out) == whole


def test_images_that_come_later_are_not_in_the_plan(source, tmp_path, whole):
    copy, out = damage(source, tmp_path / "copy"), tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, copy, Stopping(7))
    smooth(9, 9).save(copy / "n0" / "later.png")
    assert encode(out, copy).samples == 21
    assert {name: content for name, content in files(out).items() if name != DATASET_FILE} == {
        name: content for name, content in whole.items() if name != DATASET_FILE
    }


# bad images

BAD = ("n0/i06.jpg", "n1/i13.jpg", "n2/i02.jpg")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_within_the_allowance_are_named_and_left_out(source, tmp_path, workers):
    copy, told = damage(source, tmp_path / "copy", *BAD), Told()
    info = encode(tmp_path / "set", copy, max_bad=3, workers=workers, watcher=told)
    assert info.samples == 18 and sorted(info.images["skipped"]) == sorted(BAD)
    for name in BAD:
        assert any(line.startswith(f"skipped {copy / name}: ") for line in told.lines)
    assert told.steps[-1] == (21, 21, 3)
    for sample in read_set(tmp_path / "set"):
        assert np.array_equal(sample.latent, PIXEL.encode(cropped(source, sample.key))[0])
    assert [fault for _, faults in verify_set(LatentShards(tmp_path / "set"), 1) for fault in faults] == []


def test_one_too_many_ends_it_and_a_larger_allowance_goes_on(source, tmp_path):
    copy, out = damage(source, tmp_path / "copy", *BAD), tmp_path / "set"
    for max_bad in (0, 1, 2, 2):  # a restart counts what was recorded before it
        with pytest.raises(DataError, match=f"{max_bad + 1} bad images, --max-bad allows {max_bad}: {copy}/n./i..[.]jpg: "):
            encode(out, copy, max_bad=max_bad)
        assert not (out / DATASET_FILE).exists()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert done
    info = encode(out, copy, max_bad=3)
    assert sorted(info.images["skipped"]) == sorted(BAD)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    encode(tmp_path / "straight", copy, max_bad=3)
    assert files(out) == files(tmp_path / "straight")


def test_a_smaller_allowance_than_what_was_skipped_is_refused_at_the_start(source, tmp_path, monkeypatch):
    copy, out = damage(source, tmp_path / "copy", *BAD), tmp_path / "set"
    monkeypatch.setattr(encode_module, "end_set", stop)
    with pytest.raises(StopError):
        encode(out, copy, max_bad=3)
    with pytest.raises(DataError, match="3 bad images, --max-bad allows 2: "):
        encode(out, copy, Stopping(0), max_bad=2)


def test_an_image_that_was_mended_is_taken(source, tmp_path, whole):
    copy, out = damage(source, tmp_path / "copy", BAD[0]), tmp_path / "set"
    with pytest.raises(DataError, match=f"1 bad images, --max-bad allows 0: {copy / BAD[0]}: "):
        encode(out, copy)
    shutil.copy(source / BAD[0], copy / BAD[0])
    assert encode(out, copy).samples == 21
    assert all(files(out)[name] == whole[name] for name in whole if name != DATASET_FILE)


def test_bad_images_are_counted_over_all_processes(source, tmp_path, monkeypatch):
    copy, out = damage(source, tmp_path / "copy", *BAD), tmp_path / "set"
    as_rank(monkeypatch, 0, 1)
    with pytest.raises(StopError):
        encode(out, copy, Stopping(0))
    bad_in = {}  # shard -> its bad images
    for number, row in enumerate(json.loads((out / WORK / PLAN).read_text())["images"]):
        bad_in.setdefault(number // 5, []).extend([row[0]] if row[0] in BAD else [])
    holders = [shard for shard, names in bad_in.items() if names]
    assert len(holders) > 1
    as_rank(monkeypatch, holders[0], 5)  # a shard a rank
    if holders[0] == 0:
        monkeypatch.setattr(encode_module.time, "sleep", stop)
        with pytest.raises(StopError):
            encode(out, copy, max_bad=len(bad_in[holders[0]]))
    else:
        encode(out, copy, max_bad=len(bad_in[holders[0]]))
    as_rank(monkeypatch, holders[1], 5)
    with pytest.raises(DataError, match="bad images, --max-bad allows"):
        encode(out, copy, max_bad=len(bad_in[holders[0]]))
    monkeypatch.undo()
    as_rank(monkeypatch, 0, 1)
    assert encode(out, copy, max_bad=3).samples == 18


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("is torn"), 65, "is torn"),
        (OSError(28, "No space left on device", "a.tar"), 74, "a.tar: No space left on device"),
        (RuntimeError(), 1, "RuntimeError"),
        (UsageError("is odd"), None, ""),  # of a command line, which need not be the others'
    ],
)
def test_who_waits_for_a_rank_that_ends_with_an_error_ends_too(source, tmp_path, whole, monkeypatch, error, code, says):
    out = tmp_path / "set"
    as_rank(monkeypatch, 0, 2)
    sleeps = []

    def meanwhile(seconds):  # once the other rank fails, and from then on nothing
        sleeps.append(seconds)
        if len(sleeps) > 3:
            raise StopError
        if len(sleeps) == 1:
            as_rank(monkeypatch, 1, 2)
            failing = Stopping(0)
            failing.error = error
            with pytest.raises(type(error)):
                encode(out, source, failing)
            as_rank(monkeypatch, 0, 2)

    monkeypatch.setattr(encode_module.time, "sleep", meanwhile)
    with pytest.raises(XarScaleError if code else StopError) as caught:
        encode(out, source)
    if code:
        assert str(caught.value) == f"rank 1 ended: {says}" and caught.value.exit_code == code
    sleeps[:] = [0]
    with pytest.raises(StopError):  # started again, it waits for the other to be started again too
        encode(out, source)
    monkeypatch.setattr(encode_module.time, "sleep", lambda seconds: None)
    as_rank(monkeypatch, 0, 1)
    encode(out, source)
    assert files(out) == whole


def test_who_waits_for_the_plan_hears_that_the_listing_failed(source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "set"

    def meanwhile(seconds):
        as_rank(monkeypatch, 0, 2)
        with pytest.raises(DataError):
            encode(out, tmp_path / "empty")
        as_rank(monkeypatch, 1, 2)

    as_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(encode_module.time, "sleep", meanwhile)
    with pytest.raises(XarScaleError, match="rank 0 ended: .*empty holds neither tars nor a folder a class") as caught:
        encode(out, tmp_path / "empty")
    assert caught.value.exit_code == 65


def test_two_processes_that_record_in_the_same_moment_see_each_other(source, tmp_path, monkeypatch):
    copy, out = damage(source, tmp_path / "copy", BAD[0]), tmp_path / "set"

    def meanwhile(folder):  # this process has found its bad image, and has not written its record
        (out / WORK / "latents-000001.bad.json").write_text(json.dumps({"shard": None, "bad": [["n0/x.jpg", "is torn"]]}))

    monkeypatch.setattr(encode_module, "sync_folder", meanwhile)
    with pytest.raises(DataError, match="2 bad images, --max-bad allows 1"):
        encode(out, copy, max_bad=1, samples_per_shard=21)


def test_rank_0_sees_while_it_waits_that_the_others_found_too_many(source, tmp_path, monkeypatch):
    out = tmp_path / "set"
    as_rank(monkeypatch, 0, 2)

    def meanwhile(seconds):  # another rank, which was allowed more
        (out / WORK / "latents-000001.bad.json").write_text(json.dumps({"shard": None, "bad": [["n0/x.jpg", "is torn"]]}))

    monkeypatch.setattr(encode_module.time, "sleep", meanwhile)
    with pytest.raises(DataError, match=f"1 bad images, --max-bad allows 0: {source}/n0/x.jpg: is torn"):
        encode(out, source)


def test_a_shard_without_a_good_image_is_left_out_and_all_bad_is_no_set(source, tmp_path):
    copy = damage(source, tmp_path / "copy")
    names = [path.relative_to(copy).as_posix() for path in sorted(copy.rglob("*.jpg"))]
    for name in names[1:]:
        (copy / name).write_bytes(b"")
    for workers in (0, 1):
        out = tmp_path / f"set{workers}"
        info = encode(out, copy, max_bad=20, workers=workers)
        assert info.samples == 1 and len(info.shards) == 1 and len(list(out.glob("*.tar"))) == 1
        assert sorted(info.images["skipped"]) == names[1:]
        assert read_set(out)[0].key == names[0].removesuffix(".jpg").replace("/", "-")
    (copy / names[0]).write_bytes(b"")
    with pytest.raises(DataError, match=f"all 21 images are bad, the first {copy}/n./i..[.]jpg: is none of JPEG"):
        encode(tmp_path / "none", copy, max_bad=21)
    assert not (tmp_path / "none" / DATASET_FILE).exists()


def test_a_bad_image_in_a_tar_is_named_by_tar_and_sample(tmp_path):
    tars(tmp_path / "tars", [0, 1])
    path = tmp_path / "tars" / "part-00.tar"
    content = path.read_bytes()
    at = content.index(b"\x89PNG", content.index(b"s01.jpg"))
    path.write_bytes(content[:at] + b"\0\0\0\0" + content[at + 4 :])
    with pytest.raises(DataError, match=f"1 bad images, --max-bad allows 0: {path}, sample s01: is none of"):
        encode(tmp_path / "set", tmp_path / "tars", classes=2)
    info = encode(tmp_path / "set", tmp_path / "tars", classes=2, max_bad=1)
    assert info.images["skipped"] == ["part-00.tar, sample s01"]


# processes that decode


def test_a_decoder_that_dies_ends_it_in_one_line(source, tmp_path, whole, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encode_module, "load_image", die)
    with pytest.raises(ProcessError, match=r"DataLoader worker \(pid.*the same command goes on from here") as caught:
        encode(tmp_path / "set", source, workers=1)
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.undo()
    encode(tmp_path / "set", source, workers=1)
    assert files(tmp_path / "set") == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decoder_without_memory_is_no_bad_image(source, tmp_path, monkeypatch, workers):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(encode_module, "load_image", full)
    with pytest.raises(ProcessError, match="^out of memory while decoding$"):
        encode(tmp_path / "set", source, workers=workers, max_bad=100)


def test_a_device_without_memory_and_other_failures_are_what_they_are(source, tmp_path):
    tokenizer = Stopping(2)
    tokenizer.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ConfigError, match="batch 2: the device has no memory for that many images a pass"):
        encode(tmp_path / "set", source, tokenizer)
    tokenizer = Stopping(2)
    tokenizer.error = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        encode(tmp_path / "set", source, tokenizer)


# sets from before there was a record of the images


def test_a_set_that_does_not_say_how_its_images_were_made_is_read_and_known_as_before(source, tmp_path):
    write_set(tmp_path / "old")
    assert "images" not in json.loads((tmp_path / "old" / DATASET_FILE).read_text())
    assert LatentShards(tmp_path / "old").info.images == {}
    info = small_info()
    assert info.fingerprint == "0faa5968a5a9b0de57c018dfcf3b190a9790a421918582a731d7dcc6e76506eb"
    assert replace(info, images={"size": 256}).fingerprint != info.fingerprint
