"""Sets behind URLs: exactly what is stored, through faults of a real store; a cache that is bounded, shared and safe."""

import contextlib
import errno
import functools
import http.server
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import digits_config
from tests.object_store import ObjectStore, cut, error_500, flipped, object_store, slow
from tests.unit.conftest import write_set
from tests.unit.test_loader import CPU, assert_equal
from xar_scale.data import cache as cache_module
from xar_scale.data import remote
from xar_scale.data.cache import NodeCache
from xar_scale.data.loader import Batch, LatentDataset, RankNumbers, batches
from xar_scale.data.reader import LatentShards
from xar_scale.data.remote import RemoteFolder
from xar_scale.data.sources import lanes_of_a_node, open_shards
from xar_scale.errors import ConfigError, DataError, FileError
from xar_scale.model.entities import create_layout

COUNT, PER_SHARD = 40, 4  # ten shards
SETTINGS = ("train.global_batch=8", "data.lanes=2", "data.window=6", "data.prefetch=1")
ROOM = 10**9


@pytest.fixture(scope="module")
def store():
    with object_store() as store:
        yield store


@pytest.fixture
def folder(tmp_path):
    """The set that the store holds."""
    write_set(tmp_path / "set", COUNT, per_shard=PER_SHARD)
    return tmp_path / "set"


@pytest.fixture
def url(store, folder, monkeypatch):
    store.gets.clear()
    monkeypatch.setattr(store, "fault", store.fault)  # put back afterwards
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    return store.put(folder, f"bucket{time.monotonic_ns()}")


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache", ROOM)


def stream(path: str | Path, cache: Path, *more: str, workers: int = 0, steps: int = 10) -> list[Batch]:
    config = digits_config(f"data.path={path}", f"data.cache={cache}", f"data.workers={workers}", *SETTINGS, *more)
    dataset = LatentDataset(open_shards(config), config, create_layout(config.model))
    numbers = RankNumbers(start=0, steps=steps, global_batch=8, micro_batch=8, rank=0, world=1)
    return list(batches(dataset, numbers, CPU))


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) == 10  # two epochs
    for one, two in zip(ours, theirs, strict=True):
        assert one.faults == two.faults == ()
        assert_equal(one, two)


def shard_gets(store: ObjectStore) -> list[int]:
    return [times for path, times in store.gets.items() if path.endswith(".tar")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_is_read_as_a_local_one_each_file_once(store, folder, url, tmp_path, workers):
    assert_same_batches(stream(url, tmp_path / "cache", workers=workers), stream(folder, tmp_path))
    assert shard_gets(store) == [1] * 10
    assert [times for path, times in store.gets.items() if path.endswith(".index.json")] == [1] * 10
    before = sum(store.gets.values())
    stream(url, tmp_path / "cache", workers=workers)  # another job on the node
    assert sum(store.gets.values()) == before + 1  # the description alone


def test_nothing_is_lost_or_doubled_when_the_store_fails_stalls_and_cuts(store, folder, url, tmp_path):
    generator = random.Random()  # no two runs alike
    kinds = [error_500, cut, flipped, slow(0.2)]
    met = []

    def faulty(path, times, answer):
        if times > 2 or generator.random() < 0.3:
            return answer
        kind = generator.choice(kinds if path.endswith(".tar") else kinds[:2])
        met.append(kind)
        return kind(answer)

    store.fault = faulty
    assert_same_batches(stream(url, tmp_path / "cache", workers=2), stream(folder, tmp_path))
    assert len(met) > 10


def test_our_own_attempts_go_on_where_the_librarys_end(store, folder, url, cache):
    store.fault = lambda path, times, answer: error_500(answer) if path.endswith("1.tar") and times <= 7 else answer
    assert LatentShards(RemoteFolder(url, cache)).read(1, 0).key == "s0004"
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 8  # s3fs alone gives up after five


def test_the_processes_of_a_node_download_a_file_once(store, url, tmp_path):
    store.fault = lambda path, times, answer: slow(0.3)(answer)  # they all come while the first is at it
    started = [multiprocessing.get_context("fork").Process(target=_read_all, args=(url, tmp_path / "cache")) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=60)
    assert [process.exitcode for process in started] == [0] * 4
    assert shard_gets(store) == [1] * 10


def _read_all(url: str, cache: Path, limit: int = ROOM) -> None:
    shards = LatentShards(RemoteFolder(url, NodeCache(cache, limit)))
    for shard in range(10):
        shards.read(shard, 0)


def test_the_cache_stays_within_its_bound_at_every_moment(store, folder, url, tmp_path):
    limit = 4 * (folder / "latents-000000.tar").stat().st_size
    largest, stop = [0], threading.Event()
    cache = NodeCache(tmp_path / "cache", limit)  # less than what two windows need, which would be refused: it must do

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
    numbers = RankNumbers(start=0, steps=10, global_batch=8, micro_batch=8, rank=0, world=1)
    try:
        ours = list(batches(dataset, numbers, CPU))
    finally:
        stop.set()
        watcher.join()
    assert_same_batches(ours, stream(folder, tmp_path))
    assert 0 < largest[0] <= limit
    assert sum(shard_gets(store)) > 10  # what made room came again


def test_files_used_longest_ago_make_room(store, folder, url, tmp_path):
    index = sum((folder / f"latents-00000{n}.index.json").stat().st_size for n in range(4))
    cache = NodeCache(tmp_path / "cache", 3 * (folder / "latents-000000.tar").stat().st_size + index + 100)
    shards = LatentShards(RemoteFolder(url, cache))
    for shard in (0, 1, 2, 0, 3):  # the fourth makes the second go, not the first, which was used since
        shards.read(shard, 1)
        time.sleep(0.01)
    for shard in (0, 2, 3):
        shards.read(shard, 2)
    assert max(shard_gets(store)) == 1
    shards.read(1, 2)
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 2


def test_a_download_that_is_killed_leaves_nothing_locked_or_lost(store, folder, url, tmp_path):
    store.fault = lambda path, times, answer: slow(20 if times == 1 and path.endswith(".tar") else 0)(answer)
    child = multiprocessing.get_context("fork").Process(target=_read_all, args=(url, tmp_path / "cache"))
    child.start()
    begun = time.monotonic()
    while not [path for path in (tmp_path / "cache" / "xar_scale-cache").glob("*.part") if path.stat().st_size > 4000]:
        assert time.monotonic() - begun < 20
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    (part,) = (tmp_path / "cache" / "xar_scale-cache").glob("*.part")
    limit = (folder / "latents-000003.tar").stat().st_size + 600  # what the dead one took is needed
    assert part.stat().st_size + (folder / "latents-000003.tar").stat().st_size > limit
    store.fault = lambda path, times, answer: answer
    shards = LatentShards(RemoteFolder(url, NodeCache(tmp_path / "cache", limit)))
    assert shards.read(3, 0).key == "s0012"
    assert not list((tmp_path / "cache" / "xar_scale-cache").glob("*.part"))
    assert shards.read(0, 0).key == "s0000"  # the one that was under way


def test_of_a_damaged_object_only_the_damaged_sample_is_lost(store, folder, url, cache, capfd):
    content = bytearray((folder / "latents-000001.tar").read_bytes())
    content[1600] ^= 1  # of the first array
    (folder / "latents-000001.tar").write_bytes(content)
    store.put(folder, url.split("/")[2])
    says = rf"shard {url}/latents-000001.tar, sample s0004 \(number 0\): checksum does not match"
    for _ in range(2):  # processes of the node
        shards = LatentShards(RemoteFolder(url, cache))
        for _ in range(2):
            with pytest.raises(DataError, match=says):
                shards.read(1, 0)
        for position in (1, 2, 3):
            assert shards.read(1, position).key == f"s{4 + position:04d}"
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 3  # it came so three times, and is not asked for again
    assert capfd.readouterr().err.count("its checksum is not") == 2


@pytest.mark.parametrize("size", [0, 4096, 5000, 8192])
def test_a_truncated_object_is_no_store_that_fails(store, folder, url, cache, size, monkeypatch):
    """Also where it ends before a later block begins, so that a range of nothing is asked for."""
    monkeypatch.setattr(remote, "BLOCK", 4096)
    tar = folder / "latents-000001.tar"
    tar.write_bytes(tar.read_bytes()[:size])
    store.put(folder, url.split("/")[2])
    with pytest.raises(DataError, match=rf"shard {url}/latents-000001.tar: it has {size:,} bytes, the index says"):
        LatentShards(RemoteFolder(url, cache)).read(1, 0)


@pytest.mark.parametrize("grown", [False, True])
def test_an_object_of_another_size_is_named(store, folder, url, cache, grown):
    path = folder / "latents-000001.index.json"
    content = path.read_bytes()
    path.write_bytes(content + b" " if grown else content[:-1])
    tar = folder / "latents-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    store.put(folder, url.split("/")[2])
    shards = LatentShards(RemoteFolder(url, cache))
    with pytest.raises(DataError, match=f"{url}/latents-000001.index.json: its checksum is not"):
        shards.read(1, 0)
    with pytest.raises(DataError, match=rf"shard {url}/latents-000002.tar: it has [\d,]+ bytes, the index says [\d,]+"):
        shards.read(2, 0)


def test_what_is_not_there_is_named(store, url, cache):
    store.delete(url, "latents-000001.tar")
    shards = LatentShards(RemoteFolder(url, cache))
    with pytest.raises(DataError, match=f"{url}/latents-000001.tar is missing"):
        shards.read(1, 0)
    with pytest.raises(DataError, match="s3://no-such-bucket/set/dataset.json is missing: not a data set"):
        LatentShards(RemoteFolder("s3://no-such-bucket/set", cache))
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 1  # no use in asking again


def test_a_store_that_is_gone_is_an_error_of_files_not_of_data(cache, monkeypatch, capfd):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    where = "http://127.0.0.1:9/set"
    with pytest.raises(FileError, match=f"{where}/dataset.json cannot be read, after 4 attempts: ClientConnectorError"):
        LatentShards(RemoteFolder(where, cache))
    assert capfd.readouterr().err.count("attempt 4 of 4 in 0 s") == 1


def test_shards_of_coming_windows_are_fetched_before_they_are_asked_for(store, url, tmp_path):
    config = digits_config(f"data.path={url}", f"data.cache={tmp_path / 'cache'}", *SETTINGS)
    dataset = LatentDataset(open_shards(config), config, create_layout(config.model))
    windows = dataset.order.windows([0, 4])
    coming = {
        shard for window in windows for w in (window, dataset.order.after(window)) for shard in dataset.order.shards_in(w)
    }
    dataset.__getitems__([0, 4])
    names = [dataset.shards.info.shards[n].name for n in coming]
    wanted = {f"/{url[5:]}/{name}{ending}" for name in names for ending in (".tar", ".index.json")}
    assert 8 < len(wanted) < 20
    begun = time.monotonic()
    while {path for path in store.gets if not path.endswith("dataset.json")} != wanted:
        assert time.monotonic() - begun < 20
        time.sleep(0.01)


def test_a_copy_that_rots_is_fetched_again(store, url, cache):
    expected = LatentShards(RemoteFolder(url, cache)).read(1, 3)
    for path in cache.folder.glob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    again = LatentShards(RemoteFolder(url, cache)).read(1, 3)
    assert again.key == expected.key and (again.latent == expected.latent).all()
    for name in ("latents-000001.tar", "latents-000001.index.json"):
        assert store.gets[f"/{url[5:]}/{name}"] == 2


def test_copies_are_told_apart_by_whole_urls_and_content(store, tmp_path, cache):
    bucket = f"apart{time.monotonic_ns()}"
    first = write_set(tmp_path / "a", 8, per_shard=PER_SHARD)
    second = write_set(tmp_path / "b", 12, per_shard=PER_SHARD)
    for prefix in ("x/set", "y/set"):  # the same files, names and checksums
        store.put(tmp_path / "a", bucket, prefix)
        assert (LatentShards(RemoteFolder(f"s3://{bucket}/{prefix}", cache)).read(1, 0).latent == first[4].latent).all()
    assert _tars(cache) == 2
    store.put(tmp_path / "b", bucket, "x/set")  # written anew under the same URL
    assert (LatentShards(RemoteFolder(f"s3://{bucket}/x/set", cache)).read(1, 0).latent == second[4].latent).all()
    assert _tars(cache) == 3  # who still reads the old one finds it


def _tars(cache: NodeCache) -> int:
    return sum(path.is_file() and path.stat().st_size > 4000 for path in cache.folder.iterdir())


def test_nothing_that_is_not_the_caches_is_removed(store, folder, url, tmp_path):
    (tmp_path / "cache" / "xar_scale-cache").mkdir(parents=True)
    foreign = [tmp_path / "cache" / "thesis.pdf", tmp_path / "cache" / "xar_scale-cache" / "notes.part"]
    for path in foreign:
        path.write_bytes(bytes(10**5))
        os.utime(path, (0, 0))
    limit = (folder / "latents-000000.tar").stat().st_size + 600
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


def test_processes_with_a_cache_of_one_shard_get_on(store, folder, url, tmp_path, monkeypatch):
    """Each file is the next one's room: none may be gone before its reader has opened it."""
    monkeypatch.setattr(cache_module, "ROOM_WAIT_S", 0.001)
    limit = (folder / "latents-000003.tar").stat().st_size + 600
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_read_all, args=(url, tmp_path / "cache", limit)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=90)
    assert [process.exitcode for process in started] == [0] * 4


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/b", "a\0b", "a\nb"])
def test_no_name_leads_out_of_the_folder(store, folder, cache, name):
    values = json.loads((folder / "dataset.json").read_text())
    values["shards"][0]["name"] = name
    (folder / "dataset.json").write_text(json.dumps(values))
    for where in (folder, RemoteFolder(store.put(folder, f"names{time.monotonic_ns()}"), cache)):
        with pytest.raises(DataError, match="is in another folder, or no name of a file"):
            LatentShards(where)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *of) -> None:
        pass


def test_what_fails_ahead_of_need_does_not_end_the_fetching(store, url, cache):
    for name in ("latents-000001.tar", "latents-000002.tar", "latents-000003.tar", "latents-000004.tar", "latents-000005.tar"):
        store.delete(url, name)
    shards = LatentShards(RemoteFolder(url, cache))
    for shard in range(1, 10):
        shards.fetch_ahead(shard)
    begun = time.monotonic()
    while not all(store.gets[f"/{url[5:]}/latents-00000{n}.tar"] for n in (6, 7, 8, 9)):
        assert time.monotonic() - begun < 20
        time.sleep(0.01)


def test_windows_are_announced_once(store, url, tmp_path, monkeypatch):
    config = digits_config(f"data.path={url}", f"data.cache={tmp_path / 'cache'}", *SETTINGS)
    dataset, announced = LatentDataset(open_shards(config), config, create_layout(config.model)), []
    monkeypatch.setattr(dataset.shards, "fetch_ahead", announced.append)
    dataset.__getitems__([0, 4])
    count = len(announced)
    dataset.__getitems__([1, 5])
    assert len(announced) == count > 4


def test_waits_between_attempts_grow(monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: 1.0)
    with pytest.raises(FileError, match="after 10 attempts"):
        remote._get("http://127.0.0.1:9/a")
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_denied_access_is_said_at_once(monkeypatch):
    def deny(*of, **more):
        asked.append(of)
        raise PermissionError("Access Denied")

    asked = []
    monkeypatch.setattr(remote.fsspec, "url_to_fs", deny)
    with pytest.raises(FileError, match="s3://a/b: Access Denied"):
        remote._get("s3://a/b")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("lanes", "world", "local", "most"),
    [(8, 1, 1, 8), (8, 4, 1, 2), (8, 4, 2, 4), (8, 5, 1, 3), (8, 16, 1, 1), (8, 16, 8, 4), (1, 16, 8, 1), (9, 6, 4, 6)],
)
def test_lanes_of_a_node_are_those_that_its_ranks_read(lanes, world, local, most):
    batch = lanes * world  # each rank's slice is of whole samples then
    of_rank = [{number // world for number in range(rank * lanes, (rank + 1) * lanes)} for rank in range(world)]
    nodes = [set().union(*of_rank[first : first + local]) for first in range(0, world, local)]
    assert batch == lanes * world and max(map(len, nodes)) == most
    assert lanes_of_a_node(lanes, world, local) == most


def test_a_plain_web_server_without_ranges_will_do(folder, cache, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1000)  # several requests a file, were they honoured
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        shards, local = LatentShards(RemoteFolder(where, cache)), LatentShards(folder)
        for position in range(PER_SHARD):
            assert (shards.read(2, position).latent == local.read(2, position).latent).all()
        with pytest.raises(DataError, match=f"{where}/none/dataset.json is missing"):
            LatentShards(RemoteFolder(f"{where}/none", cache))
        server.shutdown()


def test_a_file_comes_in_blocks(store, folder, url, cache, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4096)
    assert (LatentShards(RemoteFolder(url, cache)).read(1, 0).latent == LatentShards(folder).read(1, 0).latent).all()
    size = (folder / "latents-000001.tar").stat().st_size
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == -(-size // 4096) > 1


def test_a_url_that_no_library_opens_and_a_pipe_are_refused(tmp_path):
    def opened(path: str):
        return open_shards(digits_config(f"data.path='{path}'", f"data.cache={tmp_path}"))

    with pytest.raises(ConfigError, match="nosuch://a cannot be opened: Protocol not known: nosuch"):
        opened("nosuch://a")
    for pipe in ("pipe:cat /etc/passwd", "pipe://cat"):
        with pytest.raises(ConfigError, match="a pipe runs a program"):
            opened(pipe)


def test_a_missing_library_is_named(monkeypatch, cache):
    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match="s3://a/b cannot be opened: Install s3fs"):
        RemoteFolder("s3://a/b", cache)


def test_a_cache_too_small_for_what_is_read_at_a_time_is_refused_with_the_numbers(url, tmp_path, monkeypatch):
    def opened(gigabytes: float):
        return open_shards(digits_config(f"data.path={url}", f"data.cache={tmp_path}", f"data.cache_gb={gigabytes}", *SETTINGS))

    # windows of 6 in shards of 4: up to 3 a window, two windows a lane, and ten shards in all
    with pytest.raises(
        ConfigError, match=r"data.cache_gb is 1e-05, .* 6 samples in each of a node's 2 lanes .* 10 shards of 0.0 MB"
    ):
        opened(1e-5)
    opened(11e-5)
    monkeypatch.setenv("WORLD_SIZE", "2")  # two nodes: a lane each
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match=r"a node's 1 lanes .* 6 shards"):
        opened(1e-5)
    opened(7e-5)


def test_a_file_larger_than_the_cache_is_named(url, tmp_path):
    says = rf"the data cache {tmp_path}/xar_scale-cache holds 100 bytes, a file has [\d,]+: data.cache_gb"
    with pytest.raises(FileError, match=says):
        LatentShards(RemoteFolder(url, NodeCache(tmp_path, 100))).read(0, 0)


def test_a_cache_that_cannot_be_written_is_named(url, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=f"the data cache {tmp_path}/file/xar_scale-cache: Not a directory"):
        NodeCache(tmp_path / "file", ROOM)
    child = multiprocessing.get_context("fork").Process(target=_read_with_a_full_disk, args=(url, tmp_path / "full"))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert not list((tmp_path / "full").rglob("*.part"))


def _read_with_a_full_disk(url: str, folder: Path) -> None:
    shards = LatentShards(RemoteFolder(url, NodeCache(folder, ROOM)))
    shards.read(0, 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # a write beyond fails as on a full disk
    with pytest.raises(FileError, match=f"the data cache {folder}/xar_scale-cache: File too large"):
        shards.read(1, 0)
