"""Sets behind URLs: exactly what is stored, in spite of faults of a real store."""

import functools
import gzip
import http.server
import json
import random
import re
import threading
import time

import pytest

from tests.conftest import digits_config
from tests.object_store import cut, error_500, flipped, slow
from tests.unit.remote_sets import PER_SHARD, SETTINGS, assert_same_batches, shard_gets, stream
from xar_scale.data import cache as node_cache
from xar_scale.data import remote
from xar_scale.data.loader import LatentDataset
from xar_scale.data.reader import LatentShards
from xar_scale.data.remote import RemoteFolder
from xar_scale.data.sources import open_shards
from xar_scale.errors import ConfigError, DataError, FileError
from xar_scale.model.entities import create_layout


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_set_is_read_as_a_local_one_each_file_once(store, stored, url, tmp_path, workers):
    assert_same_batches(stream(url, tmp_path / "cache", workers=workers), stream(stored, tmp_path))
    assert shard_gets(store) == [1] * 10
    assert [times for path, times in store.gets.items() if path.endswith(".index.json")] == [1] * 10
    before = sum(store.gets.values())
    stream(url, tmp_path / "cache", workers=workers)  # another job on the node
    assert sum(store.gets.values()) == before + 1  # only the description


def test_nothing_is_lost_or_doubled_when_the_store_fails_stalls_and_cuts(store, stored, url, tmp_path):
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
    assert_same_batches(stream(url, tmp_path / "cache", workers=2), stream(stored, tmp_path))
    assert len(met) > 10


def test_our_own_attempts_go_on_where_the_librarys_end(store, stored, url, cache):
    store.fault = lambda path, times, answer: error_500(answer) if path.endswith("1.tar") and times <= 7 else answer
    assert LatentShards(RemoteFolder(url, cache)).read(1, 0).key == "s0004"
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 8  # s3fs alone gives up after five


def test_of_a_damaged_object_only_the_damaged_sample_is_lost(store, stored, url, cache, capfd):
    content = bytearray((stored / "latents-000001.tar").read_bytes())
    content[1600] ^= 1  # of the first array
    (stored / "latents-000001.tar").write_bytes(content)
    store.put(stored, url.split("/")[2])
    says = rf"shard {url}/latents-000001.tar, sample s0004 \(number 0\): checksum does not match"
    for _ in range(2):  # processes of the node
        shards = LatentShards(RemoteFolder(url, cache))
        for _ in range(2):
            with pytest.raises(DataError, match=says):
                shards.read(1, 0)
        for position in (1, 2, 3):
            assert shards.read(1, position).key == f"s{4 + position:04d}"
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 3  # downloaded three times, and not again
    assert capfd.readouterr().err.count("its checksum is not") == 2


@pytest.mark.parametrize("size", [0, 4096, 5000, 8192])
def test_a_truncated_object_is_no_store_that_fails(store, stored, url, cache, size, monkeypatch):
    """Also if it ends before a later block starts, so that the requested range is empty."""
    monkeypatch.setattr(remote, "BLOCK", 4096)
    tar = stored / "latents-000001.tar"
    tar.write_bytes(tar.read_bytes()[:size])
    store.put(stored, url.split("/")[2])
    with pytest.raises(DataError, match=rf"shard {url}/latents-000001.tar: it has {size:,} bytes, the index says"):
        LatentShards(RemoteFolder(url, cache)).read(1, 0)


@pytest.mark.parametrize("grown", [False, True])
def test_an_object_of_another_size_is_named(store, stored, url, cache, grown):
    path = stored / "latents-000001.index.json"
    content = path.read_bytes()
    path.write_bytes(content + b" " if grown else content[:-1])
    tar = stored / "latents-000002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    store.put(stored, url.split("/")[2])
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
    assert store.gets[f"/{url[5:]}/latents-000001.tar"] == 1  # retrying is useless


def test_a_store_that_is_gone_is_an_error_of_files_not_of_data(cache, monkeypatch, capfd):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    where = "http://127.0.0.1:9/set"
    with pytest.raises(FileError, match=f"{where}/dataset.json cannot be read after 4 attempts: ClientConnectorError"):
        LatentShards(RemoteFolder(where, cache))
    assert capfd.readouterr().err.count("attempt 4 of 4 in 0 s") == 1


@pytest.mark.parametrize("shared", [False, True], ids=["", "all by one lock"])
def test_shards_of_coming_windows_are_fetched_before_they_are_asked_for(store, url, tmp_path, monkeypatch, shared):
    if shared:  # as two files' may be
        monkeypatch.setattr(node_cache, "_bucket", lambda key: key if key == node_cache.ROOM else "one")
    config = digits_config(f"data.path={url}", f"data.cache={tmp_path / 'cache'}", *SETTINGS)
    dataset = LatentDataset(open_shards(config), config, create_layout(config.model))
    windows = dataset.order.windows([0, 4])
    coming = {
        shard for window in windows for w in (window, dataset.order.next_window(window)) for shard in dataset.order.shards_in(w)
    }
    dataset.__getitems__([0, 4])
    names = [dataset.shards.info.shards[n].name for n in coming]
    wanted = {f"/{url[5:]}/{name}{ending}" for name in names for ending in (".tar", ".index.json")}
    assert 8 < len(wanted) < 20
    begun = time.monotonic()
    while {path for path in store.gets if not path.endswith("dataset.json")} != wanted:
        assert time.monotonic() - begun < 100, wanted ^ {*store.gets}
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/b", "a\0b", "a\nb"])
def test_no_name_leads_out_of_the_folder(store, stored, cache, name):
    values = json.loads((stored / "dataset.json").read_text())
    values["shards"][0]["name"] = name
    (stored / "dataset.json").write_text(json.dumps(values))
    for where in (stored, RemoteFolder(store.put(stored, f"names{time.monotonic_ns()}"), cache)):
        with pytest.raises(DataError, match="is in another folder, or not a file name"):
            LatentShards(where)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *of) -> None:
        pass


def test_what_fails_ahead_of_need_does_not_end_the_fetching(store, url, cache):
    for name in ("latents-000001.tar", "latents-000002.tar", "latents-000003.tar", "latents-000004.tar", "latents-000005.tar"):
        store.delete(url, name)
    shards = LatentShards(RemoteFolder(url, cache))
    shards.prefetch(range(1, 10))
    begun = time.monotonic()
    while not all(store.gets[f"/{url[5:]}/latents-00000{n}.tar"] for n in (6, 7, 8, 9)):
        assert time.monotonic() - begun < 200
        time.sleep(0.01)


def test_windows_are_announced_once(store, url, tmp_path, monkeypatch):
    config = digits_config(f"data.path={url}", f"data.cache={tmp_path / 'cache'}", *SETTINGS)
    dataset, announced = LatentDataset(open_shards(config), config, create_layout(config.model)), []
    monkeypatch.setattr(dataset.shards, "prefetch", announced.extend)
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


def test_who_waited_for_another_s_attempts_does_not_begin_them_anew(cache, monkeypatch):
    """Otherwise one of many workers would take so long that it counts as a hang."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "MAX_WAIT_S", 0.3)
    folder, said = RemoteFolder("http://127.0.0.1:9/set", cache), []

    def ask() -> None:
        with pytest.raises(FileError) as caught:
            folder.descriptor("a.tar", 1000, 0)
        said.append(str(caught.value))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert [re.findall(r"after (\d+) attempts", line) for line in said] == [["10"], ["4"], ["4"], ["4"]]


def test_denied_access_is_said_at_once(monkeypatch):
    def deny(*of, **more):
        asked.append(of)
        raise PermissionError("Access Denied")

    asked = []
    monkeypatch.setattr(remote.fsspec, "url_to_fs", deny)
    with pytest.raises(FileError, match="s3://a/b: Access Denied"):
        remote._get("s3://a/b")
    assert len(asked) == 1


def test_a_plain_web_server_without_ranges_will_do(stored, cache, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1000)  # several requests per file, if ranges were honoured
    handler = functools.partial(_Quiet, directory=str(stored))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        shards, local = LatentShards(RemoteFolder(where, cache)), LatentShards(stored)
        for position in range(PER_SHARD):
            assert (shards.read(2, position).latent == local.read(2, position).latent).all()
        with pytest.raises(DataError, match=f"{where}/none/dataset.json is missing"):
            LatentShards(RemoteFolder(f"{where}/none", cache))
        server.shutdown()


class _Bomb(http.server.BaseHTTPRequestHandler):
    """Answers with far more than it sends, and does not say how much."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(gzip.compress(bytes(1 << 24)))

    def log_message(self, *of):
        pass


def test_a_description_that_expands_without_end_is_not_read_to_its_end(cache, monkeypatch):
    monkeypatch.setattr(remote, "MAX_DESCRIPTION", 1 << 20)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Bomb) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(DataError, match=f"{where}/dataset.json has over 1,048,576 bytes: neither a description nor"):
            LatentShards(RemoteFolder(where, cache))
        server.shutdown()


def test_an_object_too_large_for_an_index_is_not_fetched(store, url, cache, monkeypatch):
    shards = LatentShards(RemoteFolder(url, cache))
    monkeypatch.setattr(remote, "MAX_DESCRIPTION", 100)
    with pytest.raises(DataError, match=f"{url}/latents-000001.index.json has over 100 bytes: neither a description nor"):
        shards.read(1, 0)
    assert store.gets[f"/{url[5:]}/latents-000001.index.json"] == 0


def test_a_file_comes_in_blocks(store, stored, url, cache, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4096)
    assert (LatentShards(RemoteFolder(url, cache)).read(1, 0).latent == LatentShards(stored).read(1, 0).latent).all()
    size = (stored / "latents-000001.tar").stat().st_size
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
