"""Sets made by other tools: stock webdataset's tars, and MAR's cache."""

import json
import zipfile

import numpy as np
import pytest
import webdataset as wds

from tests.unit.conftest import small_info, small_samples
from xar_scale.data import foreign
from xar_scale.data.foreign import index_set, mar_samples
from xar_scale.data.index import Members
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DATASET_FILE, INDEX
from xar_scale.data.verify import verify_set
from xar_scale.errors import DataError, UsageError

SETTINGS = {
    "flipped": True,
    "tokenizer": {"name": "theirs"},
    "latent_scale": 0.5,
    "stored": "moments",
    "classes": 10,
    "processes": 1,
}
THEIRS = Members(latent="z.npy", flipped="zf.npy", label="y")


def stock_set(folder, samples, **arrays):
    """As webdataset's own ShardWriter writes them, four per shard, with a member that is to be ignored."""
    with wds.ShardWriter(f"{folder}/theirs-%02d.tar", maxcount=4, verbose=0) as writer:
        for sample in samples:
            own = {"z.npy": sample.latent, "zf.npy": sample.flipped, "y": str(sample.label), "info.json": {"from": sample.key}}
            writer.write({"__key__": sample.key, **own, **arrays.get(sample.key, {})})


@pytest.fixture
def samples():
    return small_samples(10, small_info(flipped=True))


def test_tars_of_stock_webdataset_are_indexed_and_read(tmp_path, samples):
    stock_set(tmp_path, samples)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    info = index_set(tmp_path, THEIRS, **SETTINGS)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    shards = LatentShards(tmp_path)
    assert shards.info == info and info.samples == 10 and [shard.samples for shard in info.shards] == [4, 4, 2]
    assert (info.shape, info.dtype, info.latent_scale, info.flipped) == ((4, 4, 4), "float16", 0.5, True)
    for number, sample in enumerate(samples):
        read = shards.read(*divmod(number, 4))
        assert (read.key, read.label) == (sample.key, sample.label)
        assert np.array_equal(read.latent, sample.latent) and np.array_equal(read.flipped, sample.flipped)
    assert [fault for _, faults in verify_set(LatentShards(tmp_path), 1) for fault in faults] == []


def test_damage_to_a_set_of_others_is_named_by_their_names(tmp_path, samples):
    stock_set(tmp_path, samples)
    index_set(tmp_path, THEIRS, **SETTINGS)
    content = bytearray((tmp_path / "theirs-00.tar").read_bytes())
    at = content.index(str(samples[2].label).encode(), content.index(b"s0002.y") + 512)
    content[at] ^= 1
    (tmp_path / "theirs-00.tar").write_bytes(content)
    [line] = [fault for _, faults in verify_set(LatentShards(tmp_path), 1) for fault in faults]
    assert line.endswith("theirs-00.tar, sample s0002 (number 2): differs from the index")


def test_a_set_is_not_indexed_twice_and_an_empty_folder_not_at_all(tmp_path, samples):
    with pytest.raises(UsageError, match=f"no folder at {tmp_path}/absent"):
        index_set(tmp_path / "absent", THEIRS, **SETTINGS)
    assert not (tmp_path / "absent").exists()
    with pytest.raises(DataError, match=f"no .tar in {tmp_path}"):
        index_set(tmp_path, THEIRS, **SETTINGS)
    stock_set(tmp_path, samples)
    index_set(tmp_path, THEIRS, **SETTINGS)
    says = f"{tmp_path} already holds a data set; to index its tars again, remove {DATASET_FILE} and [*]{INDEX}"
    with pytest.raises(UsageError, match=f"^{says}$"):
        index_set(tmp_path, THEIRS, **SETTINGS)
    for path in (tmp_path / DATASET_FILE, *tmp_path.glob(f"*{INDEX}")):
        path.unlink()
    assert index_set(tmp_path, THEIRS, **SETTINGS).samples == 10


@pytest.mark.parametrize(
    ("sha256", "error", "says"),
    [
        ("...", UsageError, "tokenizer kl16: its weights' sha256 '...' is not 64 lower-case hexadecimal digits"),
        ("0" * 64, DataError, "tokenizer kl16: its moments have 32 channels, not 4"),
    ],
)
def test_tars_that_kl16_cannot_have_made_are_refused_and_get_no_index(tmp_path, samples, sha256, error, says):
    stock_set(tmp_path, samples)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=says):
        index_set(tmp_path, THEIRS, **SETTINGS | {"tokenizer": {"name": "kl16", "sha256": sha256}})
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"s0000": {"z.npy": np.zeros((4, 4))}}, r"theirs-00.tar, sample s0000: z.npy is float64\(4, 4\), not 3-D"),
        ({"s0000": {"z.npy": np.zeros((4, 4, 4), ">f4")}}, "sample s0000: z.npy is >f4"),
        (
            {"s0005": {"z.npy": np.zeros((4, 4, 2), np.float16)}},
            r"01.tar, sample s0005: an array is not float16\(4, 4, 4\)",
        ),
        ({"s0005": {"zf.npy": np.zeros((4, 4, 4), np.float32)}}, "theirs-01.tar, sample s0005: an array is not float16"),
        ({"s0006": {"zf.npy": np.full((4, 4, 4), np.nan, np.float16)}}, "01.tar, sample s0006: an array is not finite"),
        ({"s0000": {"z.npy": np.zeros((4, 0, 4), np.float16)}}, "sample s0000: z.npy is float16"),
        ({"s0007": {"y": "10"}}, "theirs-01.tar, sample s0007: label 10 is outside 0..9"),
        ({"s0007": {"y": "x"}}, "theirs-01.tar, sample s0007: its label b'x' is not a number"),
    ],
)
def test_a_sample_of_another_kind_is_named_and_no_set_is_left(tmp_path, samples, arrays, says):
    stock_set(tmp_path, samples, **arrays)
    with pytest.raises(DataError, match=says):
        index_set(tmp_path, THEIRS, **SETTINGS)
    assert not (tmp_path / DATASET_FILE).exists()


def test_an_array_that_is_no_npy_is_refused(tmp_path, samples):
    with wds.ShardWriter(f"{tmp_path}/theirs-%02d.tar", verbose=0) as writer:
        writer.write({"__key__": "a", "z.npy": b"no array", "y": "1"})
    with pytest.raises(DataError, match=r"theirs-00.tar, sample a: z.npy is not a .npy array"):
        index_set(tmp_path, Members(latent="z.npy", label="y"), **{**SETTINGS, "flipped": False})


def npy_of(header: str, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + values


def described(shape: str) -> str:
    return f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}}}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npy_of("(" * 9000), "z.npy is not a .npy array"),
        (npy_of("{[]: 1}"), "z.npy is not a .npy array"),
        (npy_of(described("(-1, 2, 2)"), bytes(8)), r"z.npy is float16\(-1, 2, 2\), not 3-D"),
        (npy_of(described("(1000000000000, 1, 1)"), bytes(8)), ".* its header says 2,000,000,000,000 bytes, it has 8"),
        (npy_of(described("(16, 20000, 20000)"), bytes(8)), ".* its header says 12,800,000,000 bytes, it has 8"),
        (npy_of(described("(True, 1, 1)"), bytes(2)), r"an array is not float16\(1, 1, 1\) like the first"),
    ],
)
def test_a_header_that_numpy_would_not_survive_is_refused(tmp_path, content, says):
    with wds.ShardWriter(f"{tmp_path}/theirs-%02d.tar", verbose=0) as writer:
        writer.write({"__key__": "a", "z.npy": content, "y": "1"})
    with pytest.raises(DataError, match=f"theirs-00.tar, sample a: {says}"):
        index_set(tmp_path, Members(latent="z.npy", label="y"), **{**SETTINGS, "flipped": False})


@pytest.mark.parametrize("header", ["(" * 9000, described("(1000000000000, 1, 1)")])
def test_the_same_headers_in_a_cache_are_refused(tmp_path, header):
    (tmp_path / "n0000").mkdir()
    with zipfile.ZipFile(tmp_path / "n0000" / "bad.npz", "w") as file:
        file.writestr("moments.npy", npy_of(header))
    with pytest.raises(DataError, match="n0000/bad.npz is not a sample of MAR's cache: ."):
        list(mar_samples(tmp_path, "float16"))


def test_an_array_that_expands_beyond_any_of_a_cache_is_refused(tmp_path, monkeypatch):
    (tmp_path / "n0000").mkdir()
    array = np.zeros((1, 100, 100), np.float32)
    np.savez_compressed(tmp_path / "n0000" / "bad.npz", moments=array, moments_flip=array)
    monkeypatch.setattr(foreign, "MAX_ARRAY_BYTES", 30_000)
    with pytest.raises(DataError, match=r"bad.npz is not a sample of MAR's cache: an array has 40,128 bytes, over 30,000"):
        list(mar_samples(tmp_path, "float16"))


def mar_cache(root, samples):
    for sample in samples:
        folder = root / f"n{sample.label:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        moments = {"moments": sample.latent.astype(np.float32), "moments_flip": sample.flipped.astype(np.float32)}
        np.savez(folder / f"{sample.key}.JPEG.npz", **moments)


def test_samples_of_mars_cache_keep_their_class_and_are_mixed(tmp_path, samples):
    mar_cache(tmp_path, samples)
    labels = sorted({sample.label for sample in samples})
    read = {sample.key: sample for sample in mar_samples(tmp_path, "float16")}
    assert len(read) == 10 and list(read) != sorted(read)
    assert list(read) == [sample.key for sample in mar_samples(tmp_path, "float16")]
    for sample in samples:
        ours = read[f"n{sample.label:04d}-{sample.key}"]
        assert ours.label == labels.index(sample.label)
        assert np.array_equal(ours.latent, sample.latent) and ours.latent.dtype == np.float16
        assert np.array_equal(ours.flipped, sample.flipped)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "bad.npz is not a sample"), (b"PK\3\4torn", "bad.npz is not a sample"), (None, "no folders of .npz")],
)
def test_what_is_no_cache_is_refused_by_name(tmp_path, content, says):
    (tmp_path / "n0000").mkdir()
    if content is not None:
        (tmp_path / "n0000" / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(mar_samples(tmp_path, "float16"))


def test_a_cache_that_would_be_read_wrongly_is_refused(tmp_path, samples):
    mar_cache(tmp_path, samples)
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(DataError, match=r"\.hidden contains no .npz, so it is not a class: the labels after it would shift"):
        list(mar_samples(tmp_path, "float16"))
    (tmp_path / ".hidden").rmdir()
    folder = tmp_path / f"n{samples[0].label:04d}"
    (folder / "deeper").mkdir()
    with pytest.raises(DataError, match="deeper is nested deeper than"):
        list(mar_samples(tmp_path, "float16"))
    (folder / "deeper").rmdir()
    for moments in (np.full((4, 4, 4), 1e6, np.float32), np.zeros((1, 4, 4, 4), np.float32)):
        np.savez(folder / "bad.npz", moments=moments, moments_flip=moments)
        with pytest.raises(DataError, match=r"bad.npz: its moments .* are not 3-D, or not finite in float16"):
            list(mar_samples(tmp_path, "float16"))
    for name in ("a.1.npz", "a.2.npz"):
        np.savez(folder / name, moments=samples[0].latent, moments_flip=samples[0].latent)
    (folder / "bad.npz").unlink()
    assert len({sample.key for sample in mar_samples(tmp_path, "float16")}) == 12


def test_a_pickle_in_a_cache_is_never_loaded(tmp_path):
    (tmp_path / "n0000").mkdir()
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "n0000" / "bad.npz", moments=objects, moments_flip=objects)
    with pytest.raises(DataError, match=r"n0000/bad.npz is not a sample .*allow_pickle"):
        list(mar_samples(tmp_path, "float16"))


def test_an_index_is_of_the_format_that_we_write(tmp_path, samples):
    stock_set(tmp_path, samples)
    index_set(tmp_path, THEIRS, **SETTINGS)
    index = json.loads((tmp_path / f"theirs-00{INDEX}").read_text())
    assert set(index) == {"keys", "labels", "latent", "flipped"} and set(index["latent"]) == {"begin", "data", "size", "crc32"}
