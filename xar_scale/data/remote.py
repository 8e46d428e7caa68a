"""Sets behind a URL: files are fetched whole, ahead of need, into a bounded cache that the processes of a node share."""

import contextlib
import fcntl
import hashlib
import os
import queue
import random
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from xar_scale.data.storage import MissingFileError
from xar_scale.errors import ConfigError, DataError, FileError

BLOCK = 16 << 20  # bytes a request: what object stores advise, and what a cut connection costs
ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S = 10, 0.5, 60.0  # waits double: three minutes until a store counts as gone
ARRIVALS = 3  # of a whole file that is not as described, before the store's own is taken for damaged
DOWNLOADS = 4  # ahead of need at a time, a process
ROOM_WAIT_S = 0.1
PART = ".part"  # behind the name of a file that is being downloaded


class RemoteFolder:
    """Files below a URL that fsspec opens, by way of a cache. Nothing of it is open until it is used: it may be pickled."""

    def __init__(self, url: str, cache: "NodeCache") -> None:
        """Raises ConfigError where no installed library speaks the URL's protocol."""
        self.url, self.cache = url.rstrip("/"), cache
        try:
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url} cannot be opened: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "cache": self.cache}

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str, crc32: int | None = None) -> bytes:
        if crc32 is None:  # not of the set's immutable files: as it is now
            return _get(self.path(name))
        descriptor = self._descriptor(name, None, crc32)
        with os.fdopen(descriptor, "rb") as file:
            return file.read()

    def open(self, name: str, size: int, crc32: int) -> "CachedFile":
        os.close(self._descriptor(name, size, crc32))
        return CachedFile(self, name, size, crc32)

    def forget(self, name: str, size: int, crc32: int) -> bool:
        return self.cache.remove(self._key(name, crc32))

    def fetch_ahead(self, name: str, size: int | None, crc32: int) -> None:
        if not hasattr(self, "_ahead"):  # threads belong to the process that uses them
            self._ahead: queue.SimpleQueue[tuple[str, int | None, int]] = queue.SimpleQueue()
            for _ in range(DOWNLOADS):  # daemons: what is under way does not hold up the end of a process
                threading.Thread(target=self._work, name="fetch ahead", daemon=True).start()
        self._ahead.put((name, size, crc32))

    def _work(self) -> None:
        while True:
            name, size, crc32 = self._ahead.get()
            # whoever needs the file meets the error again, and says so
            with contextlib.suppress(DataError, FileError, OSError):
                if not self.cache.busy(self._key(name, crc32)):
                    os.close(self._descriptor(name, size, crc32))

    def _key(self, name: str, crc32: int) -> str:
        """The name of the file's copy: of the whole URL, and of the content, which may be another tomorrow."""
        return hashlib.sha256(f"{self.path(name)} {crc32:08x}".encode()).hexdigest()[:40]

    def _descriptor(self, name: str, size: int | None, crc32: int) -> int:
        url = self.path(name)
        for arrival in range(1, ARRIVALS + 1):
            try:
                return self.cache.open(self._key(name, crc32), crc32, lambda: _Download(url, size))
            except _ContentError as error:
                _say(f"{url}: {error}, arrival {arrival} of {ARRIVALS}")
                last = error
        raise DataError(f"{'shard ' if size else ''}{url}: {last}")


class CachedFile:
    """A file by way of the cache. It is opened for each read, so that what the cache lets go of is gone from the disk."""

    def __init__(self, folder: RemoteFolder, name: str, size: int, crc32: int) -> None:
        self.name, self._open = folder.path(name), lambda: folder._descriptor(name, size, crc32)

    def pread(self, size: int, begin: int) -> bytes:
        descriptor = self._open()
        try:
            return os.pread(descriptor, size, begin)
        finally:
            os.close(descriptor)


class NodeCache:
    """A folder of whole, checked files, of at most ``limit`` bytes together, that any number of processes use at once.

    One process downloads a file while the others wait for it; the files used longest ago make room. A download takes its
    room before it begins. Locks are the system's and end with their process, so that nothing is left locked by a kill.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises FileError where the folder cannot be made."""
        self.folder, self.limit = folder, limit
        try:
            (folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot make the data cache {folder}: {error.strerror}") from None

    def open(self, key: str, crc32: int, download: Callable[[], "_Download"]) -> int:
        """A descriptor of the file, downloaded where it is not there. It stays readable whatever becomes of the file.

        Raises _ContentError where what came does not have the checksum, FileError where it cannot be written, and what
        ``download`` raises.
        """
        path = self.folder / key
        with contextlib.suppress(FileNotFoundError):
            return _open_now(path)
        with self._locked(key):
            with contextlib.suppress(FileNotFoundError):  # another process was at it
                return _open_now(path)
            source = download()
            try:
                with self._room(key, source.size) as temporary:
                    _write(temporary, source.blocks, crc32)
                    with self._locked("room"):  # who counts what is here may overlook a file that gets another name just then
                        temporary.replace(path)
                return _open_now(path)
            except OSError as error:  # a full disk, say: no fault of the data
                raise FileError(f"the data cache {self.folder}: {error.strerror}") from None

    def busy(self, key: str) -> bool:
        """Whether the file is there, or being downloaded."""
        if (self.folder / key).exists():
            return True
        with self._locked(key, wait=False) as mine:
            return not mine

    def remove(self, key: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / key).unlink()
        return True

    @contextlib.contextmanager
    def _room(self, key: str, size: int) -> Iterator[Path]:
        """An empty file of ``size`` bytes, for the one who has the key's lock; waits until there is room for it."""
        if size > self.limit:
            raise FileError(f"the data cache {self.folder} holds {self.limit:,} bytes, a file has {size:,}: data.cache_gb")
        temporary = self.folder / f"{key}{PART}"
        temporary.unlink(missing_ok=True)  # who began it was killed
        try:
            while not self._reserve(temporary, size):
                time.sleep(ROOM_WAIT_S)  # all that is here is being downloaded: it will be whole, and may then go
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> bool:
        with self._locked("room"):
            if not self._evict(self.limit - size, held=_bucket(temporary.name)):
                return False
            with temporary.open("wb") as file:
                file.truncate(size)
            return True

    def _evict(self, limit: int, held: str) -> bool:
        """Remove files, those used longest ago first, until at most ``limit`` bytes are left; False where that cannot be.

        ``held`` is the lock that the caller holds.
        """
        files = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.name))
        total = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if total <= limit:
                break
            # a download that is under way holds its lock; one that does not was killed
            whole = not name.endswith(PART) or _bucket(name) == held
            with contextlib.nullcontext(True) if whole else self._locked(name, wait=False) as free:
                if free:
                    (self.folder / name).unlink(missing_ok=True)
                    total -= size
        return total <= limit

    @contextlib.contextmanager
    def _locked(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock that ``key`` falls to; without waiting it may be False, and another's."""
        descriptor = os.open(self.folder / "locks" / _bucket(key), os.O_RDWR | os.O_CREAT, 0o666)
        mine = False
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                mine = True
            yield mine
        finally:
            if mine:  # closing would not do where a process forked meanwhile, and has the descriptor too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _bucket(key: str) -> str:
    """The name of a key's lock, of 4,096: they are never removed."""
    return key[:3] if key != "room" else key


def _write(path: Path, blocks: Iterator[bytes], crc32: int) -> None:
    """Raises _ContentError where what came does not have the checksum."""
    found = 0
    with path.open("r+b") as file:
        for block in blocks:
            found = zlib.crc32(block, found)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if found != crc32:
        raise _ContentError(f"its checksum is {found:08x}, the set's says {crc32:08x}")


class _ContentError(Exception):
    """What came is not what the set describes."""


class _Download:
    """A file on its way. Its size must be known before it begins; where nobody knows it, it is fetched first."""

    def __init__(self, url: str, size: int | None) -> None:
        if size is None:
            whole = _get(url)
            self.size, self.blocks = len(whole), iter([whole])
        else:
            self.size, self.blocks = size, self._ranges(url, size)

    @staticmethod
    def _ranges(url: str, size: int) -> Iterator[bytes]:
        for begin in range(0, size, BLOCK):
            end = min(begin + BLOCK, size)
            block = _get(url, begin, end)
            if len(block) not in (end - begin, size):
                raise _ContentError(f"it has {begin + len(block):,} bytes, the index says {size:,}")
            yield block
            if len(block) == size:  # all of it, or a server that knows no ranges
                return


def _get(url: str, begin: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a URL. Raises MissingFileError where nothing is there, FileError where the store stays silent for long."""
    wait = FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            system, path = fsspec.url_to_fs(url)  # made anew in each process and thread; kept by fsspec
            return system.cat_file(path, start=begin, end=end)
        except FileNotFoundError:
            raise MissingFileError(f"{url} is missing") from None
        except PermissionError as error:
            raise FileError(f"{url}: {error}") from None
        except Exception as error:  # each store and library has its own kinds
            said = f"{type(error).__name__}: {str(error) or 'no more was said'}".splitlines()[0]
            if attempt == ATTEMPTS:
                raise FileError(f"{url} cannot be read, after {ATTEMPTS} attempts: {said}") from None
            if attempt > 2:
                _say(f"{url}: {said}; attempt {attempt + 1} of {ATTEMPTS} in {wait:.0f} s")
        time.sleep(wait * random.uniform(0.5, 1.5))  # a node's ranks do not come back all at once
        wait = min(2 * wait, LONGEST_WAIT_S)
    raise AssertionError


def _open_now(path: Path) -> int:
    """Open, and note the use."""
    descriptor = os.open(path, os.O_RDONLY)
    os.utime(descriptor)
    return descriptor


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
