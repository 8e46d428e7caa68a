"""The node cache: bounded at every moment, shared by processes, safe from kills and from other files in its folder."""

import contextlib
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import digits_config
from tests.object_store import slow
from tests.unit.conftest import CPU, write_set
from tests.unit.remote_sets import PER_SHARD, ROOM, SETTINGS, assert_same_batches, shard_gets, stream
from xar_scale.data import cache as cache_module
from xar_scale.data.cache import NodeCache
from xar_scale.data.loader import LatentDataset, RankBatchSampler, batches
from xar_scale.data.reader import LatentShards
from xar_scale.data.remote import RemoteFolder
from xar_scale.data.sources import max_lanes_read, open_shards
from xar_scale.errors import ConfigError, DataError, FileError
from xar_scale.model.entities import create_layout


def test_the_processes_of_a_node_download_a_file_once(store, url, tmp_path):
    store.fault = lambda path, times, answer: slow(0.3)(answer)  # all others arrive while the first downloads
    started = [multiprocessing.get_context("fork").Process(target=_read_all, args=(url, tmp_path / "cache")) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=400)
    assert [process.exitcode for process in started] == [0] * 4
    assert shard_gets(store) == [1] * 10


def _read_all(url: str, cache: Path, limit: int = ROOM) -> None:
    shards = LatentShards(RemoteFolder(url, NodeCache(cache, limit)))
    for shard in range(10):
        shards.read(shard, 0)


def test_the_cache_stays_within_its_bound_at_every_moment(store, stored, url, tmp_path):
    limit = 4 * (stored / "latents-000000.tar").stat().st_size
    largest, stop = [0], threading.Event()
    cache = NodeCache(tmp_path / "cache", limit)  # less than two windows need, which a run refuses; it must work

    def watch() -> None:
        while not stop.is_set():
            with cache._locked("room"), contextlib.suppress(FileNotFoundError):
                files = [path for path in cache.folder.iterdir() if path.is_file()]
                sizes = {path.name.removesuffix(".part"): path.stat().st_size for path in files}
                largest[0] = max(largest[0], sum(sizes.values()))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    config = digits_config(f"data.path={url}", f"data.cache={tmp_path / 'cache'}", "data.workers=2", *SETTINGS)
    dataset = LatentDataset(LatentShards(RemoteFolder(url, cache)), config, create_layout(config.model))
    numbers = RankBatchSampler(start=0, steps=10, global_batch=8, micro_batch=8, rank=0, world=1)
    try:
        ours = list(batches(dataset, numbers, CPU))
    finally:
        stop.set()
        watcher.join()
    assert_same_batches(ours, stream(stored, tmp_path))
    assert 0 < largest[0] <= limit
    assert sum(shard_gets(store)) > 10  # evicted files were downloaded again


def test_files_used_longest_ago_make_room(store, stored, url, tmp_path):
    index = sum((stored / f"latents-00000{n}.index.json").stat().st_size for n in range(4))
    cache = NodeCache(tmp_path / "cache", 3 * (stored / "latents-000000.tar").stat().st_size + index + 100)
    shards = LatentShards(RemoteFolder(url, cache))
    for shard in (0, 1, 2, 0, 3):  # the fourth evicts the second, not the first, which was used since
        shards.read(shard, 1)
        time.sleep(0.01)
    for shard in (0, 2, 3):
        shards.read(shard, 2)
    assert max(shard_gets(store)) == 1
    shards.read(1, 2)
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 2


def test_a_damaged_file_is_known_as_such_as_long_as_it_is_there(store, stored, url, tmp_path):
    content = bytearray((stored / "latents-000001.tar").read_bytes())
    content[1600] ^= 1  # of the first array
    (stored / "latents-000001.tar").write_bytes(content)
    store.put(stored, url.split("/")[2])
    cache = NodeCache(tmp_path / "cache", 2 * len(content) + 3000)
    shards = LatentShards(RemoteFolder(url, cache))

    def read(*numbers: int) -> None:
        for shard in numbers:
            shards.read(shard, 1)
            time.sleep(0.01)

    read(1, 0, 1, 2)  # shard 2 evicts shard 0, not the damaged shard 1, which was used since
    with pytest.raises(DataError, match="checksum does not match"):
        shards.read(1, 0)
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 3
    read(3, 4)
    assert not list(cache.folder.glob("*.damaged"))  # removed with the file


def test_what_is_announced_does_not_make_room_for_what_else_is(store, stored, url, tmp_path):
    index = sum((stored / f"latents-00000{n}.index.json").stat().st_size for n in range(4))
    cache = NodeCache(tmp_path / "cache", 3 * (stored / "latents-000000.tar").stat().st_size + index + 100)
    shards = LatentShards(RemoteFolder(url, cache))
    for shard in (0, 1, 2):
        shards.read(shard, 0)
        time.sleep(0.01)
    shards.prefetch([3, 0])  # the last evicts the second, not the first, which is requested
    begun = time.monotonic()
    while store.gets[f"/{url[5:]}/latents-000003.tar"] == 0 or list(cache.folder.glob("*.part")):
        assert time.monotonic() - begun < 200
        time.sleep(0.01)
    shards.read(3, 0)
    shards.read(0, 1)
    assert shard_gets(store) == [1] * 4


def test_a_download_that_is_killed_leaves_nothing_locked_or_lost(store, stored, url, tmp_path):
    store.fault = lambda path, times, answer: slow(20 if times == 1 and path.endswith(".tar") else 0)(answer)
    child = multiprocessing.get_context("fork").Process(target=_read_all, args=(url, tmp_path / "cache"))
    child.start()
    begun = time.monotonic()
    while not [path for path in (tmp_path / "cache" / "xar_scale-cache").glob("*.part") if path.stat().st_size > 4000]:
        assert time.monotonic() - begun < 200
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    (part,) = (tmp_path / "cache" / "xar_scale-cache").glob("*.part")
    limit = (stored / "latents-000003.tar").stat().st_size + 600  # needs the space that the killed process reserved
    assert part.stat().st_size + (stored / "latents-000003.tar").stat().st_size > limit
    store.fault = lambda path, times, answer: answer
    shards = LatentShards(RemoteFolder(url, NodeCache(tmp_path / "cache", limit)))
    assert shards.read(3, 0).key == "s0012"
    assert not list((tmp_path / "cache" / "xar_scale-cache").glob("*.part"))
    assert shards.read(0, 0).key == "s0000"  # the one whose download was killed


def test_a_copy_that_rots_is_fetched_again(store, url, cache):
    expected = LatentShards(RemoteFolder(url, cache)).read(1, 3)
    for path in cache.folder.glob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    again = LatentShards(RemoteFolder(url, cache)).read(1, 3)
    assert again.key == expected.key and (again.latent == expected.latent).all()
    for name in ("latents-000001.tar", "latents-000001.index.json"):
        assert store.gets[f"/{url[5:]}/{name}"] == 2


def test_a_mark_that_outlived_its_file_is_not_the_next_one_s(store, url, cache):
    """Left by a process killed between the two removals. With it, a corrupted copy would never be downloaded again."""
    folder = RemoteFolder(url, cache)
    shards = LatentShards(folder)
    info = shards.info.shards[0]
    copy = cache.folder / folder.key(f"{info.name}.tar", info.crc32)
    mark = copy.with_name(f"{copy.name}.damaged")
    mark.touch()
    shards.read(0, 0)
    assert copy.exists() and not mark.exists()


def test_copies_are_told_apart_by_whole_urls_and_content(store, tmp_path, cache):
    bucket = f"apart{time.monotonic_ns()}"
    first = write_set(tmp_path / "a", 8, per_shard=PER_SHARD)
    second = write_set(tmp_path / "b", 12, per_shard=PER_SHARD)
    for prefix in ("x/set", "y/set"):  # the same files, names and checksums
        store.put(tmp_path / "a", bucket, prefix)
        assert (LatentShards(RemoteFolder(f"s3://{bucket}/{prefix}", cache)).read(1, 0).latent == first[4].latent).all()
    assert _tars(cache) == 2
    store.put(tmp_path / "b", bucket, "x/set")  # a new set under the same URL
    assert (LatentShards(RemoteFolder(f"s3://{bucket}/x/set", cache)).read(1, 0).latent == second[4].latent).all()
    assert _tars(cache) == 3  # a process that still reads the old set finds its copy


def _tars(cache: NodeCache) -> int:
    return sum(path.is_file() and path.stat().st_size > 4000 for path in cache.folder.iterdir())


def test_nothing_that_is_not_the_caches_is_removed(store, stored, url, tmp_path):
    (tmp_path / "cache" / "xar_scale-cache").mkdir(parents=True)
    foreign = [tmp_path / "cache" / "thesis.pdf", tmp_path / "cache" / "xar_scale-cache" / "notes.part"]
    for path in foreign:
        path.write_bytes(bytes(10**5))
        os.utime(path, (0, 0))
    limit = (stored / "latents-000000.tar").stat().st_size + 600
    shards = LatentShards(RemoteFolder(url, NodeCache(tmp_path / "cache", limit)))
    for shard in range(4):
        shards.read(shard, 0)
    assert all(path.exists() for path in foreign)


def test_a_cache_that_is_swept_away_comes_again(store, url, cache):
    shards = LatentShards(RemoteFolder(url, cache))
    expected = shards.read(0, 0)
    shutil.rmtree(cache.folder)
    assert (shards.read(0, 0).latent == expected.latent).all()  # of an open shard
    shutil.rmtree(cache.folder)
    assert shards.read(1, 0).key == "s0004"  # of another


def test_another_users_copy_may_be_read(store, url, cache, monkeypatch):
    LatentShards(RemoteFolder(url, cache)).read(0, 0)

    def refuse(*of):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert LatentShards(RemoteFolder(url, cache)).read(0, 0).key == "s0000"


def test_processes_with_a_cache_of_one_shard_get_on(store, stored, url, tmp_path, monkeypatch):
    """Each file needs the space of the one before: none may be evicted before its reader has opened it."""
    monkeypatch.setattr(cache_module, "ROOM_WAIT_S", 0.001)
    limit = (stored / "latents-000003.tar").stat().st_size + 600
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_read_all, args=(url, tmp_path / "cache", limit)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=400)
    assert [process.exitcode for process in started] == [0] * 4


@pytest.mark.parametrize(
    ("lanes", "world", "local", "most"),
    [(8, 1, 1, 8), (8, 4, 1, 2), (8, 4, 2, 4), (8, 5, 1, 3), (8, 16, 1, 1), (8, 16, 8, 4), (1, 16, 8, 1), (9, 6, 4, 6)],
)
def test_lanes_of_a_node_are_those_that_its_ranks_read(lanes, world, local, most):
    batch = lanes * world  # then each rank's slice is a whole number of samples
    of_rank = [{number // world for number in range(rank * lanes, (rank + 1) * lanes)} for rank in range(world)]
    nodes = [set().union(*of_rank[first : first + local]) for first in range(0, world, local)]
    assert batch == lanes * world and max(map(len, nodes)) == most
    assert max_lanes_read(lanes, world, local) == most


def test_a_cache_too_small_for_what_is_read_at_a_time_is_refused_with_the_numbers(url, tmp_path, monkeypatch):
    def opened(gigabytes: float):
        return open_shards(digits_config(f"data.path={url}", f"data.cache={tmp_path}", f"data.cache_gb={gigabytes}", *SETTINGS))

    # windows of 6 in shards of 4: up to 3 a window, two windows a lane, and ten shards in all
    with pytest.raises(
        ConfigError, match=r"data.cache_gb is 1e-05, .* 6 samples in each of a node's 2 lanes .* 10 shards of 0.01024 MB"
    ) as refused:
        opened(1e-5)
    shown = float(str(refused.value).split()[-2])
    with pytest.raises(ConfigError, match=f"data.cache_gb is {shown - 1e-9}, but .* MB: {shown} GB"):
        opened(shown - 1e-9)
    opened(shown)
    opened(11e-5)
    monkeypatch.setenv("WORLD_SIZE", "2")  # two nodes: a lane each
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match=r"a node's 1 lanes .* 6 shards"):
        opened(1e-5)
    opened(7e-5)


def test_a_short_last_shard_is_not_taken_for_all_of_them(tmp_path):
    write_set(tmp_path / "set", 41, per_shard=PER_SHARD)

    def opened(gigabytes: float):
        path = f"data.path=file://{tmp_path}/set", f"data.cache={tmp_path}", f"data.cache_gb={gigabytes}"
        return open_shards(digits_config(*path, *SETTINGS, "data.lanes=1"))

    with pytest.raises(ConfigError, match=r"a node's 1 lanes .* 6 shards"):  # a window of 6: the short shard, two neighbours
        opened(1e-5)
    opened(7e-5)


def test_a_file_larger_than_the_cache_is_named(url, tmp_path):
    says = rf"the data cache {tmp_path}/xar_scale-cache is limited to 100 bytes, a file has [\d,]+: data.cache_gb"
    with pytest.raises(FileError, match=says):
        LatentShards(RemoteFolder(url, NodeCache(tmp_path, 100))).read(0, 0)


def test_a_cache_that_cannot_be_written_is_named(url, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=f"the data cache {tmp_path}/file/xar_scale-cache: Not a directory"):
        NodeCache(tmp_path / "file", ROOM)
    child = multiprocessing.get_context("fork").Process(target=_read_with_a_full_disk, args=(url, tmp_path / "full"))
    child.start()
    child.join(timeout=400)
    assert child.exitcode == 0
    assert not list((tmp_path / "full").rglob("*.part"))


def _read_with_a_full_disk(url: str, folder: Path) -> None:
    shards = LatentShards(RemoteFolder(url, NodeCache(folder, ROOM)))
    shards.read(0, 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # a write beyond fails as on a full disk
    with pytest.raises(FileError, match=f"the data cache {folder}/xar_scale-cache: File too large"):
        shards.read(1, 0)
