"""Encoding that is stopped or meets bad images: it resumes to the same bytes, or is refused."""

import errno
import fcntl
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import xar_scale.data.encode as encode_module
from tests.unit.conftest import read_set
from tests.unit.encoding import (
    PIXEL,
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
from xar_scale.data.encode import ENCODING, PLAN
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DATASET_FILE
from xar_scale.data.verify import verify_set
from xar_scale.errors import DataError, UsageError, XarScaleError

# interruptions


@pytest.mark.parametrize("passes", [0, 1, 5, 6, 7, 12, 25])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(source, tmp_path, whole, passes):
    out = tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, source, Stopping(passes))
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(done) == passes // 6  # forward passes per shard: three batches and their mirror images
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
    (out / ENCODING / "latents-000001.json").unlink()
    (out / "latents-000001.tar").write_bytes(whole["latents-000001.tar"][:1000])
    (out / "latents-000001.index.json").unlink()
    (out / "latents-000002.tar.tmp").write_bytes(b"half")
    encode(out, source)
    (out / "latents-000002.tar.tmp").unlink(missing_ok=True)
    assert files(out) == whole


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


@pytest.mark.parametrize(
    ("name", "damaged", "says"),
    [
        ("latents-000001.tar", remove, "is missing"),
        ("latents-000001.tar", cut, "is truncated: 100 bytes, the index says"),
        ("latents-000001.index.json", remove, "is missing"),
        ("latents-000001.index.json", cut, "is torn or changed"),
        ("latents-000001.index.json", flip, "is torn or changed"),
    ],
)
def test_a_recorded_shard_whose_files_are_not_as_written_is_made_again(source, tmp_path, whole, name, damaged, says):
    out, told = tmp_path / "set", Told()
    with pytest.raises(StopError):
        encode(out, source, Stopping(20))
    damaged(out / name)
    done = (out / "latents-000000.tar").stat().st_mtime_ns
    encode(out, source, reporter=told)
    assert len([line for line in told.lines if f"{out / name} {says}" in line and "encoding the shard again" in line]) == 1
    assert files(out) == whole and (out / "latents-000000.tar").stat().st_mtime_ns == done


def test_a_set_is_not_whole_before_the_files_of_all_ranks_are_as_written(source, tmp_path, whole, monkeypatch):
    out = tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, source, Stopping(0))  # makes the plan
    as_rank(monkeypatch, 1, 2)
    encode(out, source)
    (out / "latents-000003.tar").unlink()
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(DataError, match=f"{out}/latents-000003.tar is missing .1 such shards.; run the same command again"):
        encode(out, source)
    assert not (out / DATASET_FILE).exists()
    as_rank(monkeypatch, 1, 2)
    encode(out, source)
    as_rank(monkeypatch, 0, 2)
    encode(out, source)
    assert files(out) == whole


def test_the_bad_images_of_a_shard_that_is_made_again_count_no_more(source, tmp_path):
    copy, out = damage(source, tmp_path / "copy", BAD[0]), tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, copy, Stopping(25), max_bad=1)
    (record,) = (out / ENCODING).glob("latents-*.bad.json")
    (out / record.name.replace(".bad.json", ".tar")).unlink()
    shutil.copy(source / BAD[0], copy / BAD[0])
    assert encode(out, copy).samples == 21


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shard": 1, "bad": []}', '{"shard": {"name": "x"}, "bad": []}', "3"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_torn_record_is_named_and_without_it_the_shard_is_made_again(source, tmp_path, content, bad):
    copy, out = damage(source, tmp_path / "copy", *BAD[:bad]), tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, copy, Stopping(25), max_bad=bad)
    record = next((out / ENCODING).glob("latents-*.bad.json" if bad else "latents-*.json"))
    record.write_text(content)
    with pytest.raises(DataError, match=f"{record} is torn; remove it to encode its shard again"):
        encode(out, copy, max_bad=bad)
    record.unlink()
    assert encode(out, copy, max_bad=bad).samples == 21 - bad


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}, "images": []}'])
def test_a_torn_plan_is_named_and_without_the_folder_all_is_made_anew(source, tmp_path, whole, content):
    out = tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, source, Stopping(7))
    (out / ENCODING / PLAN).write_text(content)
    with pytest.raises(DataError, match=f"{out / ENCODING / PLAN} is torn; remove {out / ENCODING} to start over"):
        encode(out, source)
    shutil.rmtree(out / ENCODING)
    encode(out, source)
    assert files(out) == whole


def test_a_torn_note_of_a_rank_that_ended_is_named(source, tmp_path, monkeypatch):
    out, note = tmp_path / "set", tmp_path / "set" / ENCODING / "ended-rank-1"
    as_rank(monkeypatch, 0, 2)
    monkeypatch.setattr(encode_module.time, "sleep", lambda seconds: note.write_text(""))
    with pytest.raises(DataError, match=f"{note} is torn; rank 1 failed"):
        encode(out, source)


def test_a_record_is_written_behind_what_it_speaks_of(source, tmp_path, whole, monkeypatch):
    out = tmp_path / "set"
    monkeypatch.setattr(encode_module, "sync_folder", stop)  # between the shard and its record
    with pytest.raises(StopError):
        encode(out, source)
    work = {f"{ENCODING}/{name}" for name in (PLAN, "ended-rank-0", "rank-0.lock")}
    assert files(out).keys() == {"latents-000000.tar", "latents-000000.index.json", *work}
    monkeypatch.undo()
    encode(out, source)
    assert files(out) == whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 16}, "size 8, this command has size 16"),
        ({"dtype": "float32"}, "dtype 'float16', this command has dtype 'float32'"),
        ({"flipped": False}, "flipped True, this command has flipped False"),
        ({"precision": "bf16"}, "precision 'fp32', this command has precision 'bf16'"),
        ({"batch": 4}, "batch 2, this command has batch 4"),
        ({"samples_per_shard": 6}, "samples_per_shard 5, this command has samples_per_shard 6"),
        ({"classes": 4}, "classes None, this command has classes 4"),
        ({"image": "png"}, "image 'jpg', this command has image 'png'"),
        (
            {"tokenizer": {"name": "pixel", "patch": 4}, "size": 16},
            "tokenizer {'name': 'pixel', 'patch': 2, .* this command has",
        ),
    ],
)
def test_other_settings_are_refused_with_both_values(source, tmp_path, changes, says):
    out = tmp_path / "set"
    with pytest.raises(StopError):
        encode(out, source, Stopping(7))
    with pytest.raises(UsageError, match=f"{out} was started with {says}"):
        encode(out, source, **changes)
    encode(out, source)
    before = files(out)
    with pytest.raises(UsageError, match=f"{out} already holds a data set"):
        encode(out, source, **changes)
    assert files(out) == before and encode(out, source).samples == 21


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_process_of_a_rank_is_refused_and_harms_nothing(source, tmp_path, whole, monkeypatch, rank):
    out, refused = tmp_path / "set", []

    class Meanwhile(Told):
        def progress(self, *numbers):
            with pytest.raises(UsageError) as caught:
                encode(out, source)
            refused.append(str(caught.value))

    as_rank(monkeypatch, 0, 2)
    with pytest.raises(StopError):
        encode(out, source, Stopping(0))  # makes the plan
    as_rank(monkeypatch, rank, rank + 1)
    encode(out, source, reporter=Meanwhile())
    assert set(refused) == {f"another process is writing {out} as rank {rank}"}
    as_rank(monkeypatch, 0, 1)
    encode(out, source)
    assert files(out) == whole


def test_where_nothing_can_be_locked_it_goes_on(source, tmp_path, whole, monkeypatch):
    out, told = tmp_path / "set", Told()

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    encode(out, source, reporter=told)
    assert f"{out} cannot be locked, so a second process with rank 0 would go unnoticed: No locks available" in told.lines
    assert files(out) == whole


def test_a_crash_behind_the_description_leaves_nothing_behind(source, tmp_path, whole, monkeypatch):
    out = tmp_path / "set"
    monkeypatch.setattr(encode_module, "_clear", stop)
    with pytest.raises(StopError):
        encode(out, source)
    assert (out / ENCODING).exists()
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
