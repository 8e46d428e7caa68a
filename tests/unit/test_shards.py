"""Shards: what is written is read back, also by stock webdataset; what cannot be written is refused."""

import gc
import os
import pickle
import tarfile
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.conftest import assert_same_samples, read_set, small_info, small_samples, write_set
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DATASET_FILE, ENCODING, ShardInfo, ShardWriter
from xar_scale.errors import DataError, UsageError


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 9),
    per_shard=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from(["float16", "float32"]),
    flipped=st.booleans(),
)
def test_what_is_written_is_read(tmp_path_factory, count, per_shard, shape, dtype, flipped):
    folder = tmp_path_factory.mktemp("set")
    written = write_set(folder, count, per_shard=per_shard, shape=shape, dtype=dtype, flipped=flipped)
    info = LatentShards(folder).info
    assert info.samples == count and len(info.shards) == -(-count // per_shard)
    assert info == small_info(shape=shape, dtype=dtype, flipped=flipped, shards=info.shards)
    assert_same_samples(read_set(folder), written)
    assert list(LatentShards(folder).faults()) == []


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=5), samples=st.integers(1, 12))
def test_the_most_shards_that_samples_in_a_row_lie_in(counts, samples):
    info = small_info(shards=tuple(ShardInfo(f"s{number}", count, 1, 0, 0) for number, count in enumerate(counts)))
    row = range(min(samples, info.samples))
    orders = ([shard for shard in order for _ in range(counts[shard])] for order in permutations(range(len(counts))))
    met = [len(set(order[first : first + len(row)])) for order in orders for first in range(info.samples - len(row) + 1)]
    assert info.max_shards_spanned(samples) == max(met)


def test_samples_are_read_in_any_order(tmp_path):
    written = write_set(tmp_path, 10)
    shards = LatentShards(tmp_path)
    for number in (9, 0, 5, 4, 5):
        assert_same_samples([shards.read(*divmod(number, 4))], [written[number]])


def test_no_more_files_stay_open_than_allowed(tmp_path, monkeypatch):
    written = write_set(tmp_path, 10, per_shard=1)
    monkeypatch.setattr(LatentShards, "open_shards", 2)
    shards = LatentShards(tmp_path)

    def opened():
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(link).startswith(str(tmp_path)) for link in links)

    for number in (*range(10), *range(10)):
        assert_same_samples([shards.read(number, 0)], [written[number]])
        assert opened() <= 2
    del shards
    gc.collect()
    assert opened() == 0


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_set(tmp_path / name, flipped=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "latents-000001.tar") as tar:  # no time, no owner
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_stock_webdataset_reads_our_tars(tmp_path):
    written = write_set(tmp_path, 10, flipped=True)
    read = []
    for path in sorted(tmp_path.glob("*.tar")):
        read += list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == [sample.key for sample in written]
    for got, expected in zip(read, written, strict=True):
        assert got["cls"] == expected.label and isinstance(got["cls"], int)
        assert got["latent.npy"].dtype == np.float16 and np.array_equal(got["latent.npy"], expected.latent)
        assert np.array_equal(got["flipped.npy"], expected.flipped)


def test_mirrored_arrays_are_kept_apart(tmp_path):
    written = write_set(tmp_path, 3, flipped=True)
    for got, expected in zip(read_set(tmp_path), written, strict=True):
        assert np.array_equal(got.flipped, expected.flipped) and not np.array_equal(got.flipped, got.latent)


def test_moments_are_twice_the_latent_channels(tmp_path):
    write_set(tmp_path, 1, shape=(8, 4, 2), stored="moments")
    assert LatentShards(tmp_path).info.latent_shape == (4, 4, 2)
    assert small_info(shape=(8, 4, 2)).latent_shape == (8, 4, 2)


def test_an_opened_set_can_be_pickled_to_a_worker(tmp_path):
    written = write_set(tmp_path, 6)
    shards = LatentShards(tmp_path)
    shards.read(0, 0)
    again = pickle.loads(pickle.dumps(shards))
    assert again.info == shards.info
    assert_same_samples([again.read(1, 1), shards.read(1, 0)], [written[5], written[4]])


# writing


def test_a_set_is_never_written_over(tmp_path):
    write_set(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} already holds a data set; remove it or write elsewhere"):
        write_set(tmp_path, 3)
    assert contents(tmp_path) == before


def test_a_set_that_its_tokenizer_cannot_have_made_is_not_begun(tmp_path):
    made = {"tokenizer": {"name": "kl16", "sha256": "0" * 64}, "stored": "moments"}
    with pytest.raises(DataError, match="tokenizer kl16: its moments have 32 channels, not 16"):
        write_set(tmp_path / "set", shape=(16, 4, 4), **made)
    assert not (tmp_path / "set").exists()
    write_set(tmp_path / "set", shape=(32, 4, 4), **made)


def test_a_set_not_written_to_its_end_is_no_set(tmp_path):
    info = small_info()

    def breaks():
        with ShardWriter(tmp_path, info, samples_per_shard=2) as writer:
            for sample in small_samples(5, info):
                writer.add(*sample)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaks()
    assert (tmp_path / "latents-000000.tar").exists() and not (tmp_path / DATASET_FILE).exists()
    with pytest.raises(DataError, match=f"{tmp_path}/dataset.json is missing: not a data set, or an incomplete one"):
        LatentShards(tmp_path)
    written = write_set(tmp_path, 5)  # and can be written again
    assert_same_samples(read_set(tmp_path), written)


def test_shards_of_a_write_that_did_not_finish_do_not_stay_in_a_set_with_fewer(tmp_path):
    samples = small_samples(5, small_info())
    killed = ShardWriter(tmp_path, small_info(), samples_per_shard=1)
    for sample in samples:
        killed.add(*sample)
    others = ("latents-000004-copy.tar", "latents-000004.txt", "latents-000009.tar", "other-000004.tar")
    for name in others:
        (tmp_path / name).write_text("not ours")
    write_set(tmp_path, samples=samples)
    assert_same_samples(read_set(tmp_path), samples)
    written = [f"latents-00000{number}{ending}" for number in range(2) for ending in (".tar", ".index.json")]
    assert sorted(contents(tmp_path)) == sorted([*others, *written, DATASET_FILE])


def test_an_encoding_that_is_not_finished_is_not_written_over(tmp_path):
    (tmp_path / ENCODING).mkdir()
    with pytest.raises(UsageError, match=f"{tmp_path} holds an encoding that is not finished"):
        ShardWriter(tmp_path, small_info())


def test_no_temporary_file_is_left(tmp_path):
    write_set(tmp_path, 5)
    shards = ["latents-000000.index.json", "latents-000000.tar", "latents-000001.index.json", "latents-000001.tar"]
    assert sorted(contents(tmp_path)) == ["dataset.json", *shards]


@pytest.mark.parametrize("key", ["n.1", "a/b", "", "k" * 81])
def test_keys_that_webdataset_would_cut_are_refused(tmp_path, key):
    with pytest.raises(DataError, match=f"sample key '{key}'"):
        ShardWriter(tmp_path, small_info()).add(key, 0, np.zeros((4, 4, 4), np.float16))


def test_the_longest_key_is_written_and_read(tmp_path):
    info, key = small_info(flipped=True), "k" * 80
    array = np.zeros((4, 4, 4), np.float16)
    with ShardWriter(tmp_path, info) as writer:
        writer.add(key, 0, array, array)
    assert LatentShards(tmp_path).read(0, 0).key == key


def test_a_key_that_comes_twice_is_refused(tmp_path):
    writer, array = ShardWriter(tmp_path, small_info()), np.zeros((4, 4, 4), np.float16)
    writer.add("a", 0, array)
    with pytest.raises(DataError, match="sample key 'a' appears twice"):
        writer.add("a", 1, array)


@pytest.mark.parametrize(("flipped", "complaint"), [(True, "mirrored array missing"), (False, "mirrored array unexpected")])
def test_every_sample_of_a_set_has_a_mirrored_array_or_none(tmp_path, flipped, complaint):
    array = np.zeros((4, 4, 4), np.float16)
    with pytest.raises(DataError, match=f"sample a: {complaint}"):
        ShardWriter(tmp_path, small_info(flipped=flipped)).add("a", 0, array, None if flipped else array)


def test_arrays_in_any_memory_order_come_back(tmp_path):
    array = np.arange(64, dtype=np.float16).reshape(4, 4, 4)
    with ShardWriter(tmp_path, small_info()) as writer:
        writer.add("a", 0, np.asfortranarray(array))
        writer.add("b", 0, array.transpose(2, 1, 0))
    shards = LatentShards(tmp_path)
    assert np.array_equal(shards.read(0, 0).latent, array)
    assert np.array_equal(shards.read(0, 1).latent, array.transpose(2, 1, 0))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file/set"):
        ShardWriter(tmp_path / "file" / "set", small_info())


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_outside_the_classes_are_refused(tmp_path, label):
    with pytest.raises(DataError, match=rf"sample a: label {label} is outside 0..9"):
        ShardWriter(tmp_path, small_info()).add("a", label, np.zeros((4, 4, 4), np.float16))


@pytest.mark.parametrize("array", [np.zeros((4, 4, 5), np.float16), np.zeros((4, 4, 4), np.float32)])
def test_arrays_of_another_shape_or_type_are_refused(tmp_path, array):
    right = np.zeros((4, 4, 4), np.float16)
    writer = ShardWriter(tmp_path, small_info(flipped=True))
    with pytest.raises(DataError, match=r"sample a: latent.npy is float.*, the set is float16\(4, 4, 4\)"):
        writer.add("a", 0, array, right)
    with pytest.raises(DataError, match=r"sample a: flipped.npy is float"):
        writer.add("a", 0, right, array)
