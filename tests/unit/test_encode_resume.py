"""Encoding that is stopped or meets bad images: it resumes to the same bytes, or is refused."""

import errno
import fcntl
import shutil

import numpy as np
import pytest

import xar_scale.data.encode as encode_module
from tests.unit.encoding import (
    BAD,
    StopError,
    Stopping,
    Told,
    as_rank,
    damage,
    encode,
    files,
    smooth,
    stop,
)
from xar_scale.data.encode import ENCODING, PLAN
from xar_scale.data.shards import DATASET_FILE
from xar_scale.errors import DataError, UsageError

NESTED = pytest.param("[" * 100_000, id="nested")

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


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"shard": 1, "bad": []}', '{"shard": {"name": "x"}, "bad": []}', "3", NESTED]
)
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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}, "images": []}', NESTED])
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
