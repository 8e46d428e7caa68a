"""Sets behind a URL: whole files are prefetched into the node cache (see cache.py)."""

import contextlib
import hashlib
import os
import queue
import random
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import fsspec

from xar_scale.data.cache import ContentError, Download, NodeCache
from xar_scale.data.storage import FileSpec, MissingFileError
from xar_scale.errors import ConfigError, DataError, FileError

BLOCK = 16 << 20  # bytes per request: as object stores recommend; also the cost of a dropped connection
ATTEMPTS, FIRST_WAIT_S, MAX_WAIT_S = 10, 0.5, 60.0  # waits double: three minutes, plus those of the store's library
START_ATTEMPTS = 4  # some seconds, at startup: waiting does not fix what is wrong then (credentials, for example)
CHECKSUM_TRIES = 3  # downloads of a file that does not match its description, before the original is taken as damaged
MAX_DESCRIPTION = 1 << 28  # bytes of a file that is read whole: an index of a million samples has half of that
PREFETCH_THREADS = 4  # per process


class RemoteFolder:
    """Files below a URL that fsspec opens, through a cache. Nothing is open until first used, so it can be pickled."""

    def __init__(self, url: str, cache: NodeCache) -> None:
        """Raises ConfigError if no installed library supports the URL's protocol."""
        self.url, self.cache = url.rstrip("/"), cache
        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url} cannot be opened: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "cache": self.cache}

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        return _get(self.path(name), attempts=START_ATTEMPTS)

    def read_immutable(self, name: str, crc32: int) -> bytes:
        content = self._content(name, crc32)
        if zlib.crc32(content) != crc32 and self.discard(name, crc32):
            content = self._content(name, crc32)
        return content

    def _content(self, name: str, crc32: int) -> bytes:
        with os.fdopen(self.descriptor(name, None, crc32), "rb") as file:
            return file.read()

    def open(self, name: str, size: int, crc32: int) -> "CachedFile":
        os.close(self.descriptor(name, size, crc32))
        return CachedFile(self, name, size, crc32)

    def discard(self, name: str, crc32: int) -> bool:
        return self.cache.discard(self.key(name, crc32))

    def prefetch(self, files: Sequence[FileSpec]) -> None:
        # before any download starts: files that are already here must not be evicted for it
        missing = [file for file in files if not self.cache.touch(self.key(file[0], file[2]))]
        if not hasattr(self, "_ahead"):  # threads belong to the process that uses them
            self._ahead: queue.SimpleQueue[FileSpec] = queue.SimpleQueue()
            for _ in range(PREFETCH_THREADS):  # daemons: a download in progress does not delay the exit of the process
                threading.Thread(target=self._work, name="prefetch", daemon=True).start()
        for file in missing:
            self._ahead.put(file)

    def _work(self) -> None:
        while True:
            name, size, crc32 = self._ahead.get()
            # whoever needs the file gets the error again, and reports it
            with contextlib.suppress(DataError, FileError):
                if not self.cache.is_downloading(self.key(name, crc32)):
                    os.close(self.descriptor(name, size, crc32))

    def key(self, name: str, crc32: int) -> str:
        """Return the name of the file's copy: a hash of the full URL and of the content, which may change."""
        return hashlib.sha256(f"{self.path(name)} {crc32:08x}".encode()).hexdigest()[:40]

    def descriptor(self, name: str, size: int | None, crc32: int) -> int:
        """Return a descriptor of the file's copy, open for reading; download it if there is none.

        A file of the right ``size`` that arrives with a wrong checksum each time is used as it is: its samples have their own
        checksums. Raises DataError if it has another size, or a wrong checksum and no known size.
        """
        url, key = self.path(name), self.key(name, crc32)
        for attempt in range(1, CHECKSUM_TRIES + 1):
            damaged = size is not None and attempt == CHECKSUM_TRIES
            try:
                return self.cache.open(key, crc32, partial(_download, url, size, time.monotonic()), damaged=damaged)
            except ContentError as error:
                _say(f"{url}: {error}; download {attempt} of {CHECKSUM_TRIES}")
                last = error
        raise DataError(f"{'shard ' if size else ''}{url}: {last}")


class CachedFile:
    """A file in the cache. It is opened for each read, so that a file that the cache evicts frees its disk space."""

    def __init__(self, folder: RemoteFolder, name: str, size: int, crc32: int) -> None:
        self.name = folder.path(name)
        self._open_copy = partial(folder.cache.open_copy, folder.key(name, crc32))
        self._download = partial(folder.descriptor, name, size, crc32)

    def pread(self, size: int, begin: int) -> bytes:
        descriptor = self._open_copy()
        if descriptor is None:
            descriptor = self._download()
        try:
            return os.pread(descriptor, size, begin)
        except OSError as error:
            raise FileError(f"cannot read the copy of {self.name}: {error.strerror}") from None
        finally:
            os.close(descriptor)


def _download(url: str, size: int | None, asked: float) -> Download:
    """Return the download of a file, requested at time ``asked``. If its size is unknown, fetch the file first."""
    # after that long, another process's attempts have failed; if each started over, the last would wait for those of all
    attempts = ATTEMPTS if time.monotonic() - asked < MAX_WAIT_S else START_ATTEMPTS
    if size is None:
        whole = _get(url, attempts=attempts)
        return Download(len(whole), iter([whole]))
    return Download(size, _blocks(url, size, attempts))


def _blocks(url: str, size: int, attempts: int) -> Iterator[bytes]:
    for begin in range(0, size, BLOCK):
        end = min(begin + BLOCK, size)
        block = _get(url, begin, end, attempts)
        if len(block) not in (end - begin, size):
            raise ContentError(f"it has {begin + len(block):,} bytes, the index says {size:,}")
        yield block
        if len(block) == size:  # the whole file: also from a server that does not support ranges
            return


def _get(url: str, begin: int | None = None, end: int | None = None, attempts: int = ATTEMPTS) -> bytes:
    """Return the bytes of a URL.

    Raises MissingFileError if it does not exist, DataError if it is to be read whole and too large for that, ContentError if
    it ends before ``end``, FileError if access is denied or all attempts fail.
    """
    wait = FIRST_WAIT_S
    for attempt in range(1, attempts + 1):
        try:
            system, path = fsspec.url_to_fs(url)  # one per process and thread; cached by fsspec
            return _whole(system, path) if end is None else system.cat_file(path, start=begin, end=end)
        except FileNotFoundError:
            raise MissingFileError(f"{url} is missing") from None
        except _TooLargeError:
            raise DataError(f"{url} has over {MAX_DESCRIPTION:,} bytes: neither a description nor an index") from None
        except PermissionError as error:
            raise FileError(f"{url}: {error}") from None
        except Exception as error:  # each store and library has its own types
            if end is not None and (size := _size(url)) is not None and size < end:
                raise ContentError(f"it has {size:,} bytes, the index says more") from None
            said = f"{type(error).__name__}: {str(error) or 'no details'}".splitlines()[0]
            if attempt == attempts:
                raise FileError(f"{url} cannot be read after {attempts} attempts: {said}") from None
            if attempt > 2:
                _say(f"{url}: {said}; attempt {attempt + 1} of {attempts} in {wait:.0f} s")
        time.sleep(wait * random.uniform(0.5, 1.5))  # jitter: the ranks of a node must not retry all at once
        wait = min(2 * wait, MAX_WAIT_S)
    raise AssertionError


class _TooLargeError(Exception):
    """A file that is read whole is larger than any that belongs to a set."""


def _whole(system: Any, path: str) -> bytes:
    """Return a whole file. A web server does not always say how much will come, least of all if it compresses: count."""
    if "https" not in system.protocol:
        if (system.info(path).get("size") or 0) > MAX_DESCRIPTION:
            raise _TooLargeError
        return system.cat_file(path)
    content = bytearray()
    with system.open(path, block_size=0, size=1) as file:  # a stream, opened without asking for the size
        while block := file.read(BLOCK):
            content += block
            if len(content) > MAX_DESCRIPTION:
                raise _TooLargeError
    return bytes(content)


def _size(url: str) -> int | None:
    """Return the size of a URL's file, if the store reports it: a range beyond the end fails like any other request."""
    try:
        system, path = fsspec.url_to_fs(url)
        return system.info(path).get("size")
    except Exception:
        return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
