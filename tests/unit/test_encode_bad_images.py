"""Bad images of an encoding: named, left out, counted over all processes, and held to an allowance."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import xar_scale.data.encode as encode_module
from tests.unit.conftest import read_set
from tests.unit.encoding import (
    BAD,
    PIXEL,
    StopError,
    Stopping,
    Told,
    as_rank,
    cropped,
    damage,
    encode,
    files,
    stop,
    tars,
)
from xar_scale.data.encode import ENCODING, PLAN
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DATASET_FILE
from xar_scale.data.verify import verify_set
from xar_scale.errors import DataError, UsageError, XarScaleError


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_within_the_allowance_are_named_and_left_out(source, tmp_path, workers):
    copy, told = damage(source, tmp_path / "copy", *BAD), Told()
    info = encode(tmp_path / "set", copy, max_bad=3, workers=workers, reporter=told)
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
    monkeypatch.setattr(encode_module, "write_dataset_file", stop)
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
    for number, row in enumerate(json.loads((out / ENCODING / PLAN).read_text())["images"]):
        bad_in.setdefault(number // 5, []).extend([row[0]] if row[0] in BAD else [])
    holders = [shard for shard, names in bad_in.items() if names]
    assert len(holders) > 1
    as_rank(monkeypatch, holders[0], 5)  # one shard per rank
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
        (UsageError("is odd"), None, ""),  # about a command line, and those of the others may differ
    ],
)
def test_who_waits_for_a_rank_that_ends_with_an_error_ends_too(source, tmp_path, whole, monkeypatch, error, code, says):
    out = tmp_path / "set"
    as_rank(monkeypatch, 0, 2)
    sleeps = []

    def meanwhile(seconds):  # at first the other rank fails, then nothing more happens
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
        assert str(caught.value) == f"rank 1 failed: {says}" and caught.value.exit_code == code
    sleeps[:] = [0]
    with pytest.raises(StopError):  # restarted, it waits for the other to be restarted too
        encode(out, source)
    monkeypatch.setattr(encode_module.time, "sleep", lambda seconds: None)
    as_rank(monkeypatch, 0, 1)
    encode(out, source)
    assert files(out) == whole


def test_a_rank_that_ends_a_second_time_is_noticed_again(source, tmp_path, monkeypatch):
    out, note = tmp_path / "set", tmp_path / "set" / ENCODING / "ended-rank-1"

    def fail(why):
        as_rank(monkeypatch, 1, 2)
        failing = Stopping(0)
        failing.error = DataError(why)
        with pytest.raises(DataError):
            encode(out, source, failing)
        as_rank(monkeypatch, 0, 2)

    as_rank(monkeypatch, 0, 2)
    with pytest.raises(StopError):
        encode(out, source, Stopping(0))  # makes the plan
    fail("was torn")
    os.utime(note, (0, 0))
    waits = iter([lambda: None, lambda: fail("is torn again"), stop])  # at first the note is from the earlier start
    monkeypatch.setattr(encode_module.time, "sleep", lambda seconds: next(waits)())
    with pytest.raises(XarScaleError, match="^rank 1 failed: is torn again$"):
        encode(out, source)


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
    with pytest.raises(XarScaleError, match="rank 0 failed: .*empty contains neither tars nor class folders") as caught:
        encode(out, tmp_path / "empty")
    assert caught.value.exit_code == 65


def test_what_another_process_has_recorded_counts_before_a_shard_is_done(source, tmp_path, monkeypatch):
    copy, out = damage(source, tmp_path / "copy", BAD[0]), tmp_path / "set"
    monkeypatch.setattr(encode_module, "SCAN_S", 1000)

    class Meanwhile(Told):
        def progress(self, *numbers):
            fake = {"shard": None, "bad": [["n0/x.jpg", "is torn"]]}
            (out / ENCODING / "latents-000001.bad.json").write_text(json.dumps(fake))

    with pytest.raises(DataError, match=f"2 bad images, --max-bad allows 1: {copy / BAD[0]}"):
        encode(out, copy, max_bad=1, samples_per_shard=21, reporter=Meanwhile())
    assert not (out / "latents-000000.tar").exists()


def test_two_processes_that_record_in_the_same_moment_see_each_other(source, tmp_path, monkeypatch):
    copy, out = damage(source, tmp_path / "copy", BAD[0]), tmp_path / "set"

    def meanwhile(folder):  # this process has found its bad image, but has not written its record
        (out / ENCODING / "latents-000001.bad.json").write_text(json.dumps({"shard": None, "bad": [["n0/x.jpg", "is torn"]]}))

    monkeypatch.setattr(encode_module, "sync_folder", meanwhile)
    with pytest.raises(DataError, match="2 bad images, --max-bad allows 1"):
        encode(out, copy, max_bad=1, samples_per_shard=21)


def test_rank_0_sees_while_it_waits_that_the_others_found_too_many(source, tmp_path, monkeypatch):
    out = tmp_path / "set"
    as_rank(monkeypatch, 0, 2)

    def meanwhile(seconds):  # another rank, with a larger budget
        (out / ENCODING / "latents-000001.bad.json").write_text(json.dumps({"shard": None, "bad": [["n0/x.jpg", "is torn"]]}))

    monkeypatch.setattr(encode_module.time, "sleep", meanwhile)
    with pytest.raises(DataError, match=f"1 bad images, --max-bad allows 0: {source}/n0/x.jpg: is torn"):
        encode(out, source)


def test_looks_at_what_others_have_done_take_little_of_the_time(source, tmp_path, monkeypatch):
    """A folder of 100,000 records takes a file system seconds to list."""
    out, now, looks, pauses = tmp_path / "set", [0], [], []
    as_rank(monkeypatch, 0, 2)
    listdir = os.listdir

    class Working(Told):
        def progress(self, *numbers):  # at the start, after each of seven batches, and after each scan while it waits
            now[0] += 6

    def slow(folder):
        if folder == out / ENCODING:
            looks.append(now[0])
            now[0] += 3
        return listdir(folder)

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds
        if len(pauses) == 3:
            raise StopError

    monkeypatch.setattr(os, "listdir", slow)
    monkeypatch.setattr(encode_module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with pytest.raises(StopError):
        encode(out, source, reporter=Working())
    assert looks == [0, 51, 120, 189]  # at the start, and while it waits; none in between, not even at the end of a shard
    assert pauses == [60] * 3


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
    with pytest.raises(DataError, match=f"all 21 images are bad, the first {copy}/n./i..[.]jpg: is not one of JPEG"):
        encode(tmp_path / "none", copy, max_bad=21)
    assert not (tmp_path / "none" / DATASET_FILE).exists()


def test_a_bad_image_in_a_tar_is_named_by_tar_and_sample(tmp_path):
    tars(tmp_path / "tars", [0, 1])
    path = tmp_path / "tars" / "part-00.tar"
    content = path.read_bytes()
    at = content.index(b"\x89PNG", content.index(b"s01.jpg"))
    path.write_bytes(content[:at] + b"\0\0\0\0" + content[at + 4 :])
    with pytest.raises(DataError, match=f"1 bad images, --max-bad allows 0: {path}, sample s01: is not one of"):
        encode(tmp_path / "set", tmp_path / "tars", classes=2)
    info = encode(tmp_path / "set", tmp_path / "tars", classes=2, max_bad=1)
    assert info.images["skipped"] == ["part-00.tar, sample s01"]
