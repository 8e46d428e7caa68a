"""Every kind of damage is found, and its sample named: by verification always, by reading if the bytes are used."""

import contextlib
import io
import json
import os
import signal
import subprocess
import tarfile
import zlib
from dataclasses import asdict

import numpy as np
import pytest

from tests.unit.conftest import small_info, small_samples, write_set
from xar_scale.data import verify
from xar_scale.data.index import Members, index_tar
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DATASET_FILE, INDEX, Sample, npy
from xar_scale.data.verify import stray_files, verify_set
from xar_scale.errors import DataError, ProcessError

SHARD = "latents-000001"  # of four samples, s0004 to s0007
BLOCK = tarfile.BLOCKSIZE


def faults(folder) -> list[str]:
    return [fault for _, found in verify_set(LatentShards(folder), 1) for fault in found]


def members(folder) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(folder / f"{SHARD}.tar") as tar:
        return {member.name: member for member in tar}


def damage(folder, change) -> None:
    path = folder / f"{SHARD}.tar"
    content = bytearray(path.read_bytes())
    changed = bytes(change(content, members(folder)) or content)
    assert changed != path.read_bytes()
    path.write_bytes(changed)


def describe_again(folder) -> None:
    """Record the shard's current size and checksum, as in a set that was damaged before it was indexed."""
    content = (folder / f"{SHARD}.tar").read_bytes()
    values = json.loads((folder / DATASET_FILE).read_text())
    values["shards"][1] |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    (folder / DATASET_FILE).write_text(json.dumps(values))


def zeroed(name):
    def change(content, of):
        content[of[name].offset : of[name].offset + BLOCK] = bytes(BLOCK)

    return change


def flipped_bit(name, where):
    def change(content, of):
        content[of[name].offset + where] ^= 1

    return change


def cut(name, where):
    return lambda content, of: content[: of[name].offset + where]


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path, 10, flipped=True)
    return tmp_path


def test_a_set_as_written_has_no_faults(folder):
    assert [name for name, _ in verify_set(LatentShards(folder), 2)] == ["latents-000000", SHARD, "latents-000002"]
    assert faults(folder) == [] and stray_files(folder, LatentShards(folder).info) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (flipped_bit("s0005.latent.npy", 700), ["sample s0005 (number 1): checksum"]),
        (flipped_bit("s0005.flipped.npy", BLOCK), ["sample s0005 (number 1): checksum"]),
        (zeroed("s0006.latent.npy"), ["sample s0006 (number 2): checksum", "after sample s0006, at byte"]),
        (flipped_bit("s0006.flipped.npy", 148), ["sample s0006 (number 2): checksum", "after sample s0006, at byte"]),
        (flipped_bit("s0006.cls", 148), ["after sample s0005, at byte"]),  # a garbled header
        (flipped_bit("s0006.cls", BLOCK), ["sample s0006 (number 2): differs from the index"]),  # another label
        (flipped_bit("s0007.cls", BLOCK + 100), ["has changed, in bytes that belong to no sample"]),
    ],
)
def test_damage_in_place_is_found_and_named(folder, change, found):
    damage(folder, change)
    lines = faults(folder)
    assert len(lines) == len(found)
    for line, part in zip(lines, found, strict=True):
        assert line.startswith(f"shard {folder}/{SHARD}.tar") and part in line


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (cut("s0006.latent.npy", 100), 2),  # inside a header
        (cut("s0006.latent.npy", 0), 2),  # between two members
        (cut("s0006.cls", 0), 2),  # between two samples
        (cut("s0006.flipped.npy", BLOCK + 50), 2),  # inside an array
    ],
)
def test_a_cut_shard_is_found_by_its_size_and_by_its_samples(folder, change, lost):
    damage(folder, change)
    size = (folder / f"{SHARD}.tar").stat().st_size
    assert faults(folder) == [f"shard {folder}/{SHARD}.tar is truncated: {size} bytes, the index says 20480"]
    describe_again(folder)
    lines = faults(folder)
    assert [line.split("sample ")[1][:5] for line in lines[:lost]] == ["s0006", "s0007"]


def test_a_missing_shard_and_an_index_of_another_are_found(folder):
    (folder / "latents-000000.tar").unlink()
    (folder / f"{SHARD}{INDEX}").write_bytes((folder / f"latents-000002{INDEX}").read_bytes())
    one, two = faults(folder)
    assert one == f"shard {folder}/latents-000000.tar is missing"
    assert two.startswith(f"{folder}/{SHARD}{INDEX} is torn or changed")


def test_an_index_older_than_its_shard_is_found(folder, tmp_path_factory):
    """The shard was rewritten with other samples, at the same size."""
    other = tmp_path_factory.mktemp("other")
    info = small_info(flipped=True)
    samples = [Sample(s.key, s.label, -s.latent, s.flipped) for s in small_samples(10, info)]
    write_set(other, samples=samples, flipped=True)
    (folder / f"{SHARD}.tar").write_bytes((other / f"{SHARD}.tar").read_bytes())
    assert [line.split("sample ")[1] for line in faults(folder)] == [
        f"s000{number + 4} (number {number}): checksum does not match" for number in range(4)
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_value_that_is_not_finite_is_found(tmp_path, flipped, value):
    samples = small_samples(10, small_info(flipped=True))
    (samples[5].flipped if flipped else samples[5].latent)[1, 2, 3] = value
    write_set(tmp_path, samples=samples, flipped=True)
    which = "mirrored array" if flipped else "array"
    assert faults(tmp_path) == [f"shard {tmp_path}/{SHARD}.tar, sample s0005 (number 1): its {which} is not finite"]


def test_tars_and_indexes_that_the_set_does_not_list_are_named(folder):
    for name in ("extra.tar", f"extra{INDEX}", "notes.txt"):
        (folder / name).write_text("")
    assert stray_files(folder, LatentShards(folder).info) == [f"extra{INDEX}", "extra.tar"]


# indexing


def tar_of(*entries: tuple[str, bytes], format=tarfile.USTAR_FORMAT) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in entries:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file


ARRAY = npy(np.arange(64, dtype=np.float16).reshape(4, 4, 4))
TWO = [("a.cls", b"3"), ("a.latent.npy", ARRAY), ("b.latent.npy", ARRAY[::-1]), ("b.cls", b"12\n"), ("b.txt", b"words")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_any_tar_are_indexed_whatever_else_is_in_it(format):
    long = "k" * 150 if format != tarfile.USTAR_FORMAT else "k"
    file = tar_of(*TWO, (f"{long}.cls", b"0"), (f"{long}.latent.npy", ARRAY), format=format)
    index = index_tar(file, "x.tar", Members(), flipped=False)
    assert index.keys == ["a", "b", long] and index.labels == [3, 12, 0] and not index.flipped.begin
    content = file.getvalue()
    for position, expected in enumerate((ARRAY, ARRAY[::-1], ARRAY)):
        begin, data, size, crc32 = (column[position] for column in asdict(index.latent).values())
        assert content[data : data + size] == expected and zlib.crc32(content[begin : data + size]) == crc32
        assert begin + BLOCK <= data
    assert type(index).from_json(index.to_json()) == index


def test_members_may_have_other_names():
    file = tar_of(("n/a.Z.npy", ARRAY), ("n/a.y", b"1"), ("n/a.zf.npy", ARRAY))
    index = index_tar(file, "x.tar", Members(latent="Z.npy", flipped="zf.npy", label="y"), flipped=True)
    assert index.keys == ["n/a"] and index.labels == [1] and len(index.flipped.begin) == 1


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([("a.cls", b"3"), ("b.cls", b"3")], r"shard x.tar, sample a \(number 0\): latent.npy is missing"),
        ([*TWO, ("c.latent.npy", ARRAY)], r"shard x.tar, sample c \(number 2\): cls is missing"),
        ([("a.cls", b"3"), ("a.cls", b"4")], "shard x.tar, sample a: cls appears twice"),
        ([*TWO, *TWO[:2]], "shard x.tar, sample a: appears twice"),
        ([("a.cls", b"cat"), ("a.latent.npy", ARRAY)], "shard x.tar, sample a: its label b'cat' is not a number"),
        ([("a.cls", b"-1"), ("a.latent.npy", ARRAY)], "its label b'-1' is not a number"),
        ([("a.cls", b"9" * 6000), ("a.latent.npy", ARRAY)], "its label b'9{20}' is not a number of up to 18 digits"),
    ],
)
def test_samples_that_are_not_whole_are_refused_by_name(entries, says):
    with pytest.raises(DataError, match=says):
        index_tar(tar_of(*entries), "x.tar", Members(), flipped=False)


def test_a_sample_without_its_mirrored_array_is_refused():
    with pytest.raises(DataError, match="sample a .*flipped.npy is missing"):
        index_tar(tar_of(*TWO), "x.tar", Members(), flipped=True)


def test_keys_are_those_of_webdataset():
    """Up to the first dot after the last slash. A group without array and label is not a sample."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (
            ("./v1.0", None),
            ("README", b"x"),
            ("meta.json", b"{}"),
            ("v1.0/.cls", b"1"),
            *(
                (f"{key}.{member}", content)
                for key in ("./v1.0/0", "./v1.0/1", "2")
                for member, content in (("latent.npy", ARRAY), ("cls", b"1"))
            ),
        ):
            header = tarfile.TarInfo(name)
            header.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            header.size = len(content or b"")
            tar.addfile(header, io.BytesIO(content or b""))
    assert index_tar(file, "x.tar", Members(), flipped=False).keys == ["./v1.0/0", "./v1.0/1", "2"]


def test_a_tar_that_is_zeros_from_somewhere_on_is_refused():
    """A crash may leave such a tar, with many samples lost behind what looks like its end."""
    content = bytearray(
        tar_of(*[(f"{n}.{m}", c) for n in range(30) for m, c in (("cls", b"1"), ("latent.npy", ARRAY))]).getvalue()
    )
    content[10 * 4 * BLOCK :] = bytes(len(content) - 10 * 4 * BLOCK)
    with pytest.raises(DataError, match="at byte .* zeros, more than the end of a tar has"):
        index_tar(io.BytesIO(bytes(content)), "x.tar", Members(), flipped=False)


# Tars with records of 10,240 bytes; 163,840 is also 5 of 32,768, of which the last holds the end of 64 samples, not of 63
@pytest.mark.parametrize(("records", "samples", "whole"), [(7, 24, False), (7, 25, True), (16, 63, False), (16, 64, True)])
def test_an_end_of_zeros_is_as_large_as_a_record_makes_it(records, samples, whole):
    content = tar_of(*[(f"{n}.{m}", c) for n in range(samples) for m, c in (("cls", b"1"), ("latent.npy", ARRAY))]).getvalue()
    file = io.BytesIO(content[: samples * 4 * BLOCK].ljust(records * tarfile.RECORDSIZE, b"\0"))
    with contextlib.nullcontext() if whole else pytest.raises(DataError, match="more than the end of a tar has"):
        assert len(index_tar(file, "x.tar", Members(), flipped=False).keys) == samples


@pytest.mark.parametrize("blocks", [1, 2, 20, 64, 128, 2048])
def test_a_tar_s_records_may_be_large(tmp_path, blocks):
    for name, content in TWO:
        (tmp_path / name).write_bytes(content)
    subprocess.run(["tar", "-b", str(blocks), "-cf", "x.tar", *(name for name, _ in TWO)], cwd=tmp_path, check=True)
    with (tmp_path / "x.tar").open("rb") as file:
        assert index_tar(file, "x.tar", Members(), flipped=False).keys == ["a", "b"]


@pytest.mark.parametrize("change", [lambda shards: shards[1].update(samples=3), lambda shards: shards[1].update(samples=9)])
def test_a_count_that_is_not_the_index_s_is_found(folder, change):
    values = json.loads((folder / DATASET_FILE).read_text())
    change(values["shards"])
    (folder / DATASET_FILE).write_text(json.dumps(values))
    said = f"{folder}/{SHARD}{INDEX} holds 4 samples, dataset.json says {values['shards'][1]['samples']}"
    assert faults(folder) == [said]
    with pytest.raises(DataError, match=said):
        LatentShards(folder).read(1, 0)


@pytest.mark.parametrize(
    ("name", "says"), [("latents-000000", "is listed twice"), ("../latents-000001", "is in another folder")]
)
def test_shards_are_in_the_folder_and_each_once(folder, name, says):
    values = json.loads((folder / DATASET_FILE).read_text())
    values["shards"][1]["name"] = name
    (folder / DATASET_FILE).write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"shard '{name}' {says}"):
        LatentShards(folder)


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("kind", ["garbled", "zeroed", "cut header", "cut before", "cut content"])
def test_no_damage_to_a_tar_loses_samples_in_silence(kind, position):
    """Python's tarfile silently stops at most of these."""
    file = tar_of(*TWO)
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        member = tar.getmembers()[position]
    content = bytearray(file.getvalue())
    if kind == "garbled":
        content[member.offset + 148] ^= 1
    elif kind == "zeroed":
        content[member.offset : member.offset + BLOCK] = bytes(BLOCK)
    else:
        content = content[: member.offset + {"cut header": 100, "cut before": 0, "cut content": BLOCK + 1}[kind]]
    with pytest.raises(DataError, match="shard x.tar"):
        index_tar(io.BytesIO(bytes(content)), "x.tar", Members(), flipped=False)


def test_an_empty_file_and_one_of_zeros_are_no_shards():
    with pytest.raises(DataError, match="shard x.tar"):
        index_tar(io.BytesIO(b""), "x.tar", Members(), flipped=False)
    assert index_tar(io.BytesIO(bytes(10240)), "x.tar", Members(), flipped=False).keys == []


def declared(name: str, size: int, type: bytes = tarfile.REGTYPE) -> bytes:
    """A header that declares a size, without that many bytes after it."""
    header = tarfile.TarInfo(name)
    header.size, header.type = size, type
    return header.tobuf(tarfile.GNU_FORMAT)


def extended(**values: str) -> bytes:
    """A header after a pax header with these values."""
    header = tarfile.TarInfo("a.cls")
    header.pax_headers = values
    return header.tobuf(tarfile.PAX_FORMAT)


LONG_NAME, FAR = tarfile.GNUTYPE_LONGNAME, 10**11


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (declared("a.txt", 0) + declared("b.txt", -512), "a header declares -512 bytes"),  # which leads back to itself
        (extended(size="-512"), "a header declares -512 bytes"),
        *((declared(name, FAR), "declares 100,000,000,000 bytes, the file has") for name in ("a.cls", "a.latent.npy")),
        *((declared("a", FAR, type), "declares 100,000,000,000 bytes") for type in (tarfile.XHDTYPE, LONG_NAME)),
        (extended(size=f"{FAR}"), "declares 100,000,000,000 bytes"),
        (declared("a.txt", 2**80), "a header declares 1,208,925,819,614,629,174,706,176 bytes"),
        (extended(**{"GNU.sparse.map": "a,b"}), "an extended header is garbled"),
        (extended(**{"GNU.sparse.size": "9" * 6000}), "an extended header is garbled"),
        (declared("a", 0, LONG_NAME) * 3000, "an extended header is garbled"),
    ],
)
def test_a_header_that_tarfile_would_not_survive_is_refused(tmp_path, content, says):
    (tmp_path / "x.tar").write_bytes(content + bytes(10240))
    says = f"shard x.tar is not a complete tar: .*{says}"
    with (tmp_path / "x.tar").open("rb") as file, pytest.raises(DataError, match=says):  # a file allocates what is asked of it
        index_tar(file, "x.tar", Members(), flipped=False)


def _die(shards, number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_helper_process_that_is_killed_ends_in_one_line(tmp_path, monkeypatch):
    write_set(tmp_path)
    monkeypatch.setattr(verify, "_faults", _die)  # in the processes that are forked next
    with pytest.raises(ProcessError, match="one of 2 helper processes died: killed, or out of memory"):
        list(verify_set(LatentShards(tmp_path), 2))
