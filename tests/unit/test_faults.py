"""Bad samples: each is detected, named, counted and replaced, the same way on any number of ranks."""

import json
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.processes import environment
from tests.unit.conftest import CPU, assert_equal, open_set, write_set
from xar_scale.data import shards as shards_module
from xar_scale.data.faults import BadSamples, Fault
from xar_scale.data.loader import Batch, LatentDataset, RankBatchSampler, batches
from xar_scale.data.shards import DATASET_FILE
from xar_scale.errors import ConfigError, DataError, FileError

COUNT, PER_SHARD = 12, 4
BAD = "latents-000001"  # the shard that is damaged, the middle one of three
SAMPLE = 1  # the damaged sample in it, if the damage is to one sample
TAR = f"{BAD}.tar"


def members(folder: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(folder / TAR) as tar:
        return tar.getmembers()


def overwrite(folder: Path, at: int, content: bytes) -> None:
    with (folder / TAR).open("r+b") as file:
        file.seek(at)
        file.write(content)


def rewrite(folder: Path, change) -> None:
    """Rewrite the shard with other samples and a correct index and checksums: only the content is wrong."""
    reader = open_set(folder).shards
    samples = [reader.read(1, position) for position in range(PER_SHARD)]
    info = reader.info
    shard = shards_module.ShardBuilder(info)
    for sample in change(samples):
        shard.add(*sample)
    describe(folder, shard.write(folder, BAD))


def describe(folder: Path, shard) -> None:
    values = json.loads((folder / DATASET_FILE).read_text())
    values["shards"][1] = {name: getattr(shard, name) for name in ("name", "samples", "bytes", "crc32", "index_crc32")}
    (folder / DATASET_FILE).write_text(json.dumps(values))


def nan(samples):
    array = samples[SAMPLE].latent.copy()
    array[2, 3, 1] = np.nan
    samples[SAMPLE] = samples[SAMPLE]._replace(latent=array)
    return samples


def infinite(samples):
    array = samples[SAMPLE].latent.copy()
    array[0, 0, 0] = -np.inf
    samples[SAMPLE] = samples[SAMPLE]._replace(latent=array)
    return samples


def other_shape(folder: Path) -> None:
    """Write an index and checksums that match a sample of another shape."""
    content = bytearray((folder / TAR).read_bytes())
    array = members(folder)[2 * SAMPLE + 1]
    begin, end = array.offset_data, array.offset_data + array.size
    content[begin:end] = bytes(content[begin:end]).replace(b"(4, 4, 4)", b"(4, 8, 2)")
    index = json.loads((folder / f"{BAD}.index.json").read_text())
    index["latent"]["crc32"][SAMPLE] = zlib.crc32(content[array.offset : end])
    text = json.dumps(index).encode()
    (folder / TAR).write_bytes(content)
    (folder / f"{BAD}.index.json").write_bytes(text)
    values = json.loads((folder / DATASET_FILE).read_text())
    values["shards"][1] |= {"crc32": zlib.crc32(content), "index_crc32": zlib.crc32(text)}
    (folder / DATASET_FILE).write_text(json.dumps(values))


def older_index(folder: Path) -> None:
    """Rewrite the shard with its samples in another order and the same sizes, but not its index."""
    old = (folder / f"{BAD}.index.json").read_bytes()
    reader = open_set(folder).shards
    shard = shards_module.ShardBuilder(reader.info)
    for position in reversed(range(PER_SHARD)):
        shard.add(*reader.read(1, position))
    shard.write(folder, BAD)
    (folder / f"{BAD}.index.json").write_bytes(old)


def at(number: int, offset: str = "offset") -> Callable[[Path], int]:
    return lambda folder: getattr(members(folder)[number], offset)


ARRAY = 2 * SAMPLE + 1  # its number among the tar's members
ALL = set(range(PER_SHARD))
DAMAGES = {
    # name: (the damage, the positions that are bad afterwards, the message)
    "truncated header": (lambda f: os.truncate(f / TAR, at(ARRAY)(f) + 100), ALL, f"{TAR} is truncated"),
    "garbled header": (lambda f: overwrite(f, at(ARRAY)(f), b"\xff" * 300), {SAMPLE}, "sample s0005 .*checksum"),
    "zeroed block": (lambda f: overwrite(f, at(ARRAY, "offset_data")(f), bytes(512)), {SAMPLE}, "sample s0005 .*checksum"),
    "cut between members": (lambda f: os.truncate(f / TAR, at(ARRAY)(f)), ALL, f"{TAR} is truncated"),
    "cut in a payload": (lambda f: os.truncate(f / TAR, at(ARRAY, "offset_data")(f) + 200), ALL, f"{TAR} is truncated"),
    "flipped bit": (lambda f: overwrite(f, at(ARRAY, "offset_data")(f) + 140, b"\x55"), {SAMPLE}, "sample s0005 .*checksum"),
    "missing member": (lambda f: overwrite(f, at(ARRAY)(f), bytes(1024)), {SAMPLE}, "sample s0005 .*checksum"),
    "wrong shape": (other_shape, {SAMPLE}, r"sample s0005: the array is not float16\(4, 4, 4\)"),
    "NaN": (lambda f: rewrite(f, nan), {SAMPLE}, "sample s0005 .*is not finite"),
    "infinity": (lambda f: rewrite(f, infinite), {SAMPLE}, "sample s0005 .*is not finite"),
    "missing shard": (lambda f: (f / TAR).unlink(), ALL, f"{TAR} is missing"),
    "missing index": (lambda f: (f / f"{BAD}.index.json").unlink(), ALL, f"{BAD}.index.json is missing"),
    "older index": (older_index, ALL, "sample s000. .*checksum"),
    "torn index": (lambda f: os.truncate(f / f"{BAD}.index.json", 90), ALL, f"{BAD}.index.json is torn"),
}


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path, COUNT, per_shard=PER_SHARD)
    return tmp_path


def read(folder: Path, allowed: int, *, workers=0, world=1, epochs=2) -> list[Batch]:
    """Global batches of six, concatenated from all ranks' parts."""
    more = (f"data.max_bad_samples={allowed}", f"data.workers={workers}", "train.global_batch=6", "data.lanes=2")
    streams = []
    for rank in range(world):
        numbers = RankBatchSampler(start=0, steps=2 * epochs, global_batch=6, micro_batch=6 // world, rank=rank, world=world)
        streams.append(batches(open_set(folder, *more), numbers, CPU))
    return [Batch.concatenate(parts) for parts in zip(*streams, strict=True)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_counted_and_made_up_for(folder, damage):
    do, positions, says = DAMAGES[damage]
    whole = read(folder, 0)
    assert not any(batch.faults for batch in whole)
    do(folder)
    bad_keys = {f"s{4 + position:04d}" for position in positions}
    damaged = read(folder, allowed=COUNT)
    met = BadSamples(COUNT)
    for was, is_ in zip(whole, damaged, strict=True):
        met.add(is_.faults)
        for row, key in enumerate(was.keys):
            if key in bad_keys:
                assert is_.keys[row] not in bad_keys  # another sample, intact and with its own label
            else:
                assert is_.keys[row] == key and torch.equal(is_.latents[row], was.latents[row])
            assert torch.equal(is_.noise[row], was.noise[row]) and torch.equal(is_.t[row], was.t[row])
        assert all(torch.isfinite(tensor).all() for tensor in (is_.latents, is_.noise, is_.t))
    assert met.known == {(BAD, position) for position in positions}  # two epochs: each once
    for fault in (fault for batch in damaged for fault in batch.faults):
        assert isinstance(fault.error, DataError)
    faults = [fault for batch in read(folder, allowed=0) for fault in batch.faults]
    with pytest.raises(DataError, match=says):
        BadSamples(0).add(faults)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (3, 1), (6, 0)])
def test_what_takes_the_place_of_a_bad_sample_does_not_depend_on_ranks_or_workers(folder, world, workers):
    DAMAGES["missing shard"][0](folder)
    for one, two in zip(read(folder, COUNT), read(folder, COUNT, world=world, workers=workers), strict=True):
        assert_equal(one, two)
        assert {fault[:2] for fault in one.faults} == {fault[:2] for fault in two.faults}


def test_a_substitute_is_the_next_that_can_be_read_with_its_own_label(folder):
    DAMAGES["missing shard"][0](folder)
    dataset = open_epoch(folder, "train.label_drop=0")
    keys = []
    for batch in (dataset.__getitems__([number]) for number in range(COUNT)):
        keys += batch.keys
        if batch.faults:
            assert batch.keys == ("s0008",)
        assert batch.labels.item() == 3 * int(batch.keys[0][1:]) % 10
    assert sorted(keys) == [*(f"s{n:04d}" for n in (0, 1, 2, 3)), *["s0008"] * 4, *(f"s{n:04d}" for n in (8, 9, 10, 11))]


def test_the_last_shard_is_followed_by_the_first(folder):
    (folder / "latents-000002.tar").unlink()
    dataset = open_epoch(folder)
    keys = {dataset.__getitems__([number]).keys[0] for number in range(COUNT)}
    assert keys == {f"s{n:04d}" for n in range(8)}


def open_epoch(folder: Path, *more: str) -> LatentDataset:
    """Its first ``COUNT`` samples are an epoch, and every one may be bad."""
    return open_set(folder, f"data.max_bad_samples={COUNT}", "train.global_batch=6", "data.lanes=2", *more)


def test_a_substitute_is_good_itself_and_may_lie_before_in_the_shard(folder):
    """The only good sample of the set replaces the ones after it, and those of other shards."""

    def all_but_the_first(samples):
        return [samples[0], *(s._replace(latent=np.full_like(s.latent, np.nan)) for s in samples[1:])]

    rewrite(folder, all_but_the_first)
    for other in ("latents-000000.tar", "latents-000002.tar"):
        (folder / other).unlink()
    dataset = open_epoch(folder)
    assert {dataset.__getitems__([number]).keys for number in range(COUNT)} == {("s0004",)}


def test_the_last_sample_of_a_shard_may_be_a_substitute(folder):
    def all_but_the_last(samples):
        return [*(s._replace(latent=np.full_like(s.latent, np.nan)) for s in samples[:-1]), samples[-1]]

    rewrite(folder, all_but_the_last)
    dataset = open_epoch(folder)
    keys = [dataset.__getitems__([number]).keys[0] for number in range(COUNT)]
    assert keys.count("s0007") == 4


def test_a_substitute_is_mirrored_where_its_sample_would_be(tmp_path):
    write_set(tmp_path, COUNT, per_shard=PER_SHARD, flipped=True)
    whole = open_epoch(tmp_path, "data.flip=true")
    (tmp_path / "latents-000000.tar").unlink()
    dataset = open_epoch(tmp_path, "data.flip=true")
    mirrored = [whole.shards.read_array(1, 0, flipped=flipped)[2] for flipped in (False, True)]
    seen = []
    for number in range(10 * COUNT):
        batch = dataset.__getitems__([number])
        if batch.faults:
            flipped = bool(dataset.draw([number]).flip[0] < 0.5)
            assert np.array_equal(batch.latents[0].numpy(), mirrored[flipped].astype(np.float32))
            seen.append(flipped)
    assert len(seen) == 40 and 0 < sum(seen) < 40


def test_a_substitute_that_is_bad_one_way_round_is_one_the_other_way(tmp_path):
    write_set(tmp_path, COUNT, per_shard=PER_SHARD, flipped=True)
    rewrite(tmp_path, nan)  # s0005, but not its mirrored array
    dataset = open_epoch(tmp_path, "data.flip=true")
    assert [dataset._substitute((1, 0), flipped=flipped)[1] for flipped in (False, True)] == ["s0006", "s0005"]


def test_without_a_budget_no_other_is_looked_for(folder):
    """A lost disk must not cause every sample of the set to be tried. The step is not taken: BadSamples sees to that."""
    for tar in folder.glob("*.tar"):
        tar.unlink()
    dataset = open_set(folder)
    dataset._substitute = None
    batch = dataset.__getitems__([0, 1])
    assert len(batch.faults) == 2
    assert batch.latents.abs().sum() == 0 and batch.latents.shape == (2, 4, 4, 4)  # fit to take part in a step
    with pytest.raises(DataError, match="bad samples: 2, data.max_bad_samples is 0"):
        BadSamples(0).add(batch.faults)


def test_many_bad_samples_are_tried_once_each(folder, monkeypatch):
    """Otherwise the time of a batch grows with the square of the number of bad samples."""
    rewrite(folder, lambda samples: [s._replace(latent=np.full_like(s.latent, np.nan)) for s in samples])
    dataset = open_epoch(folder)
    tried, read = [], dataset.shards.read_array
    monkeypatch.setattr(dataset.shards, "read_array", lambda *at, flipped: tried.append(at) or read(*at, flipped=flipped))
    for _ in range(5):
        dataset.__getitems__(range(COUNT))
    # each sample once, and the substitutes of four bad ones; each bad one is tried as a substitute only once
    assert len(tried) <= 5 * (COUNT + 4) + 4


def test_a_set_without_one_good_sample_is_an_end_whatever_the_budget(folder):
    for tar in folder.glob("*.tar"):
        tar.unlink()
    batch = open_set(folder, "data.max_bad_samples=1000").__getitems__([0])
    with pytest.raises(DataError, match=f"no sample of {folder} can be read"):
        BadSamples(1000).add(batch.faults)


def test_a_store_that_fails_is_no_bad_sample_and_is_asked_once(folder, monkeypatch):
    dataset, asked = open_set(folder, "data.max_bad_samples=1000"), []

    def fail(*place, flipped):
        asked.append(place)
        raise FileError("the store is gone")

    monkeypatch.setattr(dataset.shards, "read_array", fail)
    dataset.quarantine([(0, 0)])
    count = LatentDataset.CHUNK + 10
    for numbers in (range(count), range(count, 2 * count)):  # micro-batches of a step, which waits for all of them
        batch = dataset.__getitems__(numbers)
        assert len(asked) == 1  # each attempt may take minutes
        assert batch.latents.abs().sum() == 0 and len(batch.keys) == count
        with pytest.raises(FileError, match="the store is gone"):
            BadSamples(1000).add(batch.faults)


def test_the_mirrored_array_is_looked_at_too(tmp_path):
    def broken(samples):
        array = samples[SAMPLE].flipped.copy()
        array[0, 0, 0] = np.nan
        samples[SAMPLE] = samples[SAMPLE]._replace(flipped=array)
        return samples

    write_set(tmp_path, COUNT, per_shard=PER_SHARD, flipped=True)
    rewrite(tmp_path, broken)
    dataset = open_epoch(tmp_path, "data.flip=true")
    faults = [fault for number in range(40 * COUNT) for fault in dataset.__getitems__([number]).faults]
    assert {fault[:2] for fault in faults} == {(BAD, SAMPLE)}
    assert 5 < len(faults) < 35  # of forty times, where the mirror is drawn


def test_values_whose_sum_is_beyond_float32_are_no_fault(tmp_path):
    write_set(tmp_path, COUNT, per_shard=PER_SHARD, dtype="float32")
    rewrite(tmp_path, lambda samples: [s._replace(latent=np.full_like(s.latent, 3e38)) for s in samples])
    dataset = open_epoch(tmp_path)
    assert not any(dataset.__getitems__([number]).faults for number in range(COUNT))


def fault(position: int, shard: str = "a", **more) -> Fault:
    return Fault(shard, position, DataError(f"sample {position}"), **more)


def test_a_bad_sample_counts_once():
    bad = BadSamples(2, known=[("a", 7)])
    assert [f.position for f in bad.add([fault(1), fault(1), fault(7)])] == [1]
    assert bad.add([fault(1), fault(7)]) == bad.new_faults([fault(1), fault(7)]) == []
    assert bad.known == {("a", 1), ("a", 7)}
    with pytest.raises(DataError, match=r"sample 3 \(bad samples: 3, data.max_bad_samples is 2\)"):
        bad.add([fault(1), fault(3)])


def test_ranks_that_are_told_in_another_order_say_the_same():
    found = [fault(3), fault(1), fault(2, "b"), fault(2)]
    orders = [BadSamples(9).add(some) for some in (found, found[::-1])]
    assert orders[0] == orders[1] and [f[:2] for f in orders[0]] == [("a", 1), ("a", 2), ("a", 3), ("b", 2)]


def test_what_is_fatal_ends_the_run_known_or_not():
    bad = BadSamples(9, known=[("a", 1)])
    lost = Fault("a", 1, FileError("gone"), fatal=True)
    assert bad.new_faults([lost]) == [lost]
    with pytest.raises(FileError, match="gone"):
        bad.add([lost])


def test_what_is_fatal_is_not_hidden_by_another_fault_of_the_sample():
    lost = Fault("a", 1, FileError("gone"), fatal=True)
    for faults in ([fault(1), lost], [lost, fault(1)]):
        assert BadSamples(9).new_faults(faults) == [lost]


def test_a_budget_below_what_the_run_has_met_is_refused():
    BadSamples(1, known=[("a", 1)])
    with pytest.raises(ConfigError, match="data.max_bad_samples is 0, but the run has already met 1"):
        BadSamples(0, known=[("a", 1)])


def test_workers_take_no_notice_of_signals_but_go_with_what_started_them():
    program = """
import os, signal, time
from torch.utils.data import Dataset
from xar_scale.data.workers import from_workers

class Numbers(Dataset):
    def __len__(self): return 8
    def __getitem__(self, at):
        if at >= 4:
            time.sleep(0.3)
        return os.getpid()

stream = from_workers(Numbers(), 2, batch_size=None)
pid = next(stream)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
    os.kill(pid, number)
print(len([next(stream) for _ in range(6)]), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr  # and it does not wait for them at its end
