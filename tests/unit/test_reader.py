"""Reading a set: whatever is torn, changed or missing is found, and named with its shard and sample."""

import errno
import io
import json
import os
import re
import tarfile
import zlib

import numpy as np
import pytest

from tests.unit.conftest import assert_same_samples, write_set
from xar_scale.data import shards as shards_module
from xar_scale.data.reader import LatentShards, ShardError
from xar_scale.data.shards import DATASET_FILE
from xar_scale.errors import DataError, FileError

TAR, INDEX = "latents-000001.tar", "latents-000001.index.json"
NESTED = pytest.param("[" * 100_000, id="nested")


# faults: each ends in a DataError that names the file


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f"no data folder at {tmp_path}/absent"):
        LatentShards(tmp_path / "absent")


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("text", ["", '{"format": 2, "sha', "[]", "null", "\x00\x01", NESTED])
def test_a_torn_description_is_named(tmp_path, text):
    write_set(tmp_path)
    (tmp_path / DATASET_FILE).write_text(text)
    with pytest.raises(DataError, match=f"{tmp_path}/dataset.json "):
        LatentShards(tmp_path)


def test_a_description_of_another_format_is_refused_with_both(tmp_path):
    write_set(tmp_path)
    edit_json(tmp_path / DATASET_FILE, lambda values: values.update(format=99))
    with pytest.raises(DataError, match=r"dataset.json has format 99, this version reads 2"):
        LatentShards(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda values: values["shards"][0].pop("bytes"), "key shards.0.bytes is missing"),
        (lambda values: values.pop("classes"), "key classes is missing"),
        (lambda values: values.update(more=1), "unknown key more"),
        (lambda values: values.update(dtype="object"), "dtype = 'object'"),
        (lambda values: values.update(stored="other"), "stored = 'other'"),
        (lambda values: values.update(shape=[4, 4, -4]), "shape.2 = -4"),
        (lambda values: values.update(shape="abc"), "shape = 'abc'"),
        (lambda values: values.update(shape=[16, 20_000, 20_000]), "shape = .*: 12,800,000,000 bytes, at most"),
        (lambda values: values.update(shape=[10**9] * 3), "shape = .*: 2,000,000,000,000,000,000,000,000,000 bytes, at most"),
        (lambda values: values["shards"][0].update(samples=2**63), "shards.0.samples = 9223372036854775808"),
        (lambda values: values["shards"][0].update(samples="4"), "shards.0.samples = '4'"),
    ],
)
def test_a_description_with_other_fields_is_refused(tmp_path, change, complaint):
    write_set(tmp_path)
    edit_json(tmp_path / DATASET_FILE, change)
    with pytest.raises(DataError, match=f"{tmp_path}/dataset.json: {complaint}"):
        LatentShards(tmp_path)


def test_what_the_system_does_not_give_is_no_fault_of_the_data(tmp_path, monkeypatch):
    write_set(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / INDEX).mkdir()
    shards = LatentShards(tmp_path)
    with pytest.raises(FileError, match=f"cannot read {tmp_path}/{INDEX}"):
        shards.read(1, 0)
    shards.read(0, 0)

    def fail(*of):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(FileError, match=f"cannot read shard {tmp_path}/latents-000000.tar: Input/output error"):
        shards.read(0, 0)


def test_a_shard_that_cannot_be_opened_is_not_tried_again_for_each_sample(tmp_path, monkeypatch):
    write_set(tmp_path)
    (tmp_path / TAR).unlink()
    shards, tried = LatentShards(tmp_path), []
    monkeypatch.setattr(shards.storage, "read", lambda name, read=shards.storage.read: tried.append(name) or read(name))
    for position in range(4):
        with pytest.raises(ShardError, match=f"shard {tmp_path}/{TAR} is missing"):
            shards.read(1, position)
    assert tried == [INDEX]


@pytest.mark.parametrize(
    ("name", "says"), [("latents-000001", "is listed twice"), ("../latents-000000", "is in another folder")]
)
def test_shards_are_listed_once_and_in_the_folder(tmp_path, name, says):
    write_set(tmp_path)
    edit_json(tmp_path / DATASET_FILE, lambda values: values["shards"][0].update(name=name))
    with pytest.raises(DataError, match=f"dataset.json: shard '{name}' {says}"):
        LatentShards(tmp_path)


def test_an_empty_set_is_refused(tmp_path):
    write_set(tmp_path, 0)
    with pytest.raises(DataError, match="dataset.json lists no samples"):
        LatentShards(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"is truncated: \d+ bytes, the index says \d+"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "is truncated: 3000 bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is changed"),
    ],
)
def test_a_missing_or_cut_tar_is_named(tmp_path, change, says):
    write_set(tmp_path)
    change(tmp_path / TAR)
    shards = LatentShards(tmp_path)
    shards.read(0, 0)  # the others are read as before
    says = f"shard {tmp_path}/{TAR} {says}"
    (fault,) = shards.faults()
    assert fault[:2] == ("latents-000001", 0) and re.match(says, str(fault.error))
    for _ in range(2):  # what could not be opened is remembered, not tried again
        with pytest.raises(DataError, match=says):
            shards.read(1, 0)


def _member(folder, number):
    """A member of the shard: (name, offset of its header, offset of its payload, size)."""
    with tarfile.open(folder / TAR) as tar:
        member = tar.getmembers()[number]
        return member.name, member.offset, member.offset_data, member.size


@pytest.mark.parametrize("number", [1, 2, 4, 5])  # of arrays: 0 and 3 are labels, which the index holds too
@pytest.mark.parametrize("where", ["header's first byte", "header's padding", "payload's first byte", "payload's last byte"])
def test_one_flipped_bit_is_found_and_its_sample_named(tmp_path, number, where):
    written = write_set(tmp_path, 10, flipped=True)
    name, header, payload, size = _member(tmp_path, number)
    at = {"header's first byte": header, "header's padding": header + 511, "payload's first byte": payload}
    at["payload's last byte"] = payload + size - 1
    content = bytearray((tmp_path / TAR).read_bytes())
    content[at[where]] ^= 1
    (tmp_path / TAR).write_bytes(content)
    shards, bad = LatentShards(tmp_path), number // 3
    with pytest.raises(DataError, match=rf"shard {tmp_path}/{TAR}, sample {name.split('.')[0]} \(number {bad}\): checksum"):
        shards.read(1, bad)
    for position in set(range(4)) - {bad}:
        assert_same_samples([shards.read(1, position)], [written[4 + position]])


def test_a_tar_cut_while_it_is_open_is_found(tmp_path):
    write_set(tmp_path)
    shards = LatentShards(tmp_path)
    shards.read(1, 0)
    with (tmp_path / TAR).open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match=f"{TAR}, sample s0007"):
        shards.read(1, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[:50],
        lambda content: content.replace(b"s0004", b"s0005"),
        lambda content: content.replace(b'"size": [256,', b'"size": [255,'),
    ],
)
def test_a_torn_or_changed_index_is_named(tmp_path, change):
    write_set(tmp_path)
    content = (tmp_path / INDEX).read_bytes()
    (tmp_path / INDEX).write_bytes(change(content))
    assert change(content) != content
    shards = LatentShards(tmp_path)
    shards.read(0, 0)
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX} is torn or changed"):
        shards.read(1, 0)


def write_index(folder, content: bytes) -> None:
    """An index that its set vouches for."""
    (folder / INDEX).write_bytes(content)
    edit_json(folder / DATASET_FILE, lambda values: values["shards"][1].update(index_crc32=zlib.crc32(content)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index["labels"].__setitem__(2, 10), "gives sample s0006 the label 10, outside 0..9"),  # the null class
        (lambda index: index["labels"].__setitem__(2, 11), "gives sample s0006 the label 11, outside 0..9"),
        (lambda index: index["labels"].__setitem__(2, -1), "gives sample s0006 the label -1, outside 0..9"),
        (lambda index: index["labels"].__setitem__(2, 2.7), "has labels that are not integers"),
        (lambda index: index["labels"].__setitem__(2, "3"), "has labels that are not integers"),
        (lambda index: index["labels"].__setitem__(2, True), "has labels that are not integers"),
        (lambda index: index["labels"].__setitem__(2, 2**64), "gives sample s0006 the label 1844674.*, outside 0..9"),
        (lambda index: index["latent"]["data"].__setitem__(2, 2**64), "is not the index of a shard"),
        (lambda index: index.update(labels=3), "has labels that are not integers"),
        (lambda index: index["labels"].pop(), "has 3 labels for 4 samples"),
        (lambda index: index["latent"]["size"].pop(), "has 3 latent.size for 4 samples"),
        (lambda index: index["flipped"]["crc32"].pop(), "has 3 flipped.crc32 for 4 samples"),
        (lambda index: index["latent"].pop("data"), "has latent.data that are not integers"),
        (lambda index: index["latent"]["begin"].__setitem__(1, -1), "places sample s0005 where no sample can be"),
        (lambda index: index["flipped"]["size"].__setitem__(3, -1), "places sample s0007 where no sample can be"),
        (lambda index: index.pop("flipped"), "lacks mirrored arrays, dataset.json says otherwise"),
        (lambda index: index.update(keys="abcd"), "has keys that are not text"),
        (lambda index: index["keys"].__setitem__(0, None), "has keys that are not text"),
        (lambda index: index.pop("keys"), "is not the index of a shard"),
        (lambda index: index.update(latent=[]), "is not the index of a shard"),
        (lambda index: index["latent"].update(more=[]), "is not the index of a shard"),
    ],
)
def test_an_index_of_what_cannot_be_is_refused(tmp_path, change, says):
    write_set(tmp_path, flipped=True)
    index = json.loads((tmp_path / INDEX).read_text())
    change(index)
    write_index(tmp_path, json.dumps(index).encode())
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX} {says}"):
        LatentShards(tmp_path).read(1, 0)


@pytest.mark.parametrize("content", ["", "[]", "3", "\udcff", NESTED])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    write_set(tmp_path)
    write_index(tmp_path, content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX} is not the index of a shard"):
        LatentShards(tmp_path).read(1, 0)


@pytest.mark.parametrize("column", ["begin", "data", "size"])
def test_an_index_that_leads_out_of_its_tar_loses_the_sample_alone(tmp_path, column):
    written = write_set(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    for name in ("begin", "data") if column == "begin" else (column,):
        index["latent"][name][1] = 10**14
    write_index(tmp_path, json.dumps(index).encode())
    shards = LatentShards(tmp_path)
    with pytest.raises(DataError, match=rf"shard {tmp_path}/{TAR}, sample s0005 \(number 1\): checksum does not match"):
        shards.read(1, 1)
    assert_same_samples([shards.read(1, 2)], [written[6]])


def test_a_missing_index_is_named(tmp_path):
    write_set(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX} is missing"):
        LatentShards(tmp_path).read(1, 0)


def test_the_index_of_another_shard_is_refused(tmp_path):
    write_set(tmp_path, 8)
    (tmp_path / INDEX).write_bytes((tmp_path / "latents-000000.index.json").read_bytes())
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX} is torn or changed"):
        LatentShards(tmp_path).read(1, 0)


class Marker:
    """Unpickling one is detected."""

    def __reduce__(self):
        return _unpickled.append, (1,)


_unpickled: list[int] = []


def test_a_pickle_is_never_loaded(tmp_path, monkeypatch):
    def evil_npy(array):
        buffer = io.BytesIO()
        np.save(buffer, np.array([Marker()] * array.size, dtype=object).reshape(array.shape), allow_pickle=True)
        return buffer.getvalue()

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "npy", evil_npy)
        write_set(tmp_path)  # index and checksums are right
    with pytest.raises(DataError, match=r"latents-000000.tar, sample s0000: the array is not float16\(4, 4, 4\)"):
        LatentShards(tmp_path).read(0, 0)
    assert _unpickled == []


@pytest.mark.parametrize(
    "other", [np.zeros((4, 4, 2), np.float16), np.zeros((4, 4, 4), np.int16), np.zeros((4, 2, 8), np.float16)]
)
def test_an_array_of_another_shape_or_type_in_a_tar_is_refused(tmp_path, monkeypatch, other):
    npy = shards_module.npy
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "npy", lambda array: npy(other))
        write_set(tmp_path)
    with pytest.raises(DataError, match=r"latents-000000.tar, sample s0000: the array is not float16\(4, 4, 4\)"):
        LatentShards(tmp_path).read(0, 0)


def test_an_array_that_ends_early_is_refused(tmp_path, monkeypatch):
    npy = shards_module.npy
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "npy", lambda array: npy(array)[:-2])
        write_set(tmp_path)
    with pytest.raises(DataError, match="sample s0000: the array is not"):
        LatentShards(tmp_path).read(0, 0)
