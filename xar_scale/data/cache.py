"""The node cache: whole files with a bounded total size, shared by any number of processes through files and locks."""

import contextlib
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from xar_scale.errors import FileError
from xar_scale.files import locked

FOLDER, LOCKS, ROOM = "xar_scale-cache", "locks", "room"
PART, DAMAGED = ".part", ".damaged"  # suffixes of a key: a download in progress; a mark that the complete file is damaged
OURS = re.compile(rf"[0-9a-f]{{40}}({PART})?")  # only these files, and their marks, are ever removed
ROOM_WAIT_S = 0.1


class Download(NamedTuple):
    """A file being downloaded."""

    size: int
    blocks: Iterator[bytes]


class ContentError(Exception):
    """The downloaded content does not match its description."""


class NodeCache:
    """Files by key, in a subfolder of ``folder``, of at most ``limit`` bytes in total.

    One process downloads a file while the others wait for it. The least recently used files are evicted. A download reserves
    its space before it starts. Locks belong to the kernel and end with their process, so a kill leaves nothing locked. Each
    of several jobs that share a cache keeps to its own limit.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises FileError if the folder cannot be created."""
        self.folder, self.limit = folder / FOLDER, limit
        self._folder = str(self.folder)  # joining a name to a Path takes microseconds, for each sample
        with self._errors():
            (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)

    def open(self, key: str, crc32: int, download: Callable[[], Download], *, damaged: bool = False) -> int:
        """Return a descriptor of the file, downloading it if absent. It stays readable even after the file is evicted.

        Raises ContentError if the download has another checksum, unless ``damaged`` allows that; FileError if it cannot be
        written or read; and what ``download`` raises.
        """
        with self._errors():
            if (descriptor := self.open_copy(key)) is not None:
                return descriptor
            with self._locked(key):
                if (descriptor := self.open_copy(key)) is not None:  # another process has downloaded it meanwhile
                    return descriptor
                source = download()
                with self._room(key, source.size) as temporary:
                    right = _write(temporary, source.blocks) == crc32
                    if not (right or damaged):
                        raise ContentError(f"its checksum is not {crc32:08x}, the one in the set")
                    mark = self.folder / f"{key}{DAMAGED}"
                    mark.unlink(missing_ok=True) if right else mark.touch()
                    # opened before it can be evicted. The lock: a process that adds up the files may miss one during a rename
                    descriptor = os.open(temporary, os.O_RDONLY)
                    with self._locked(ROOM):
                        temporary.replace(self.folder / key)
                    return descriptor

    def open_copy(self, key: str) -> int | None:
        """Return a descriptor of the file, if present, and mark the file as used."""
        try:
            descriptor = os.open(f"{self._folder}/{key}", os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from None
        with contextlib.suppress(OSError):  # another user's file, for example, which may only be read
            os.utime(descriptor)
        return descriptor

    def touch(self, key: str) -> bool:
        """Mark the file as used; return whether it is present."""
        try:
            os.utime(f"{self._folder}/{key}")
        except FileNotFoundError:
            return False
        except OSError:  # another user's file, for example
            pass
        return True

    def is_downloading(self, key: str) -> bool:
        """Whether the file is being downloaded."""
        with self._errors():
            if not (self.folder / f"{key}{PART}").exists():  # the lock may be held for another file
                return False
            with self._locked(key, wait=False) as mine:
                return not mine

    def discard(self, key: str) -> bool:
        """Remove the file and return True; if its source is known to be damaged too, keep it and return False."""
        if (self.folder / f"{key}{DAMAGED}").exists():
            return False
        with self._errors():
            (self.folder / key).unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def _room(self, key: str, size: int) -> Iterator[Path]:
        """Yield the path of an empty file of ``size`` bytes, once there is space for it. The caller holds the key's lock."""
        if size > self.limit:
            raise FileError(
                f"the data cache {self.folder} is limited to {self.limit:,} bytes, a file has {size:,}: data.cache_gb"
            )
        temporary = self.folder / f"{key}{PART}"
        temporary.unlink(missing_ok=True)  # left by a process that was killed
        try:
            while not self._reserve(temporary, size):
                time.sleep(ROOM_WAIT_S)  # everything here is being downloaded; once complete, it can be evicted
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, temporary: Path, size: int) -> bool:
        with self._locked(ROOM):
            if not self._evict(self.limit - size, held=_bucket(temporary.name)):
                return False
            with temporary.open("wb") as file:
                file.truncate(size)
            return True

    def _evict(self, limit: int, held: str) -> bool:
        """Remove the least recently used files until at most ``limit`` bytes are left. Return False if that is impossible.

        ``held`` is the lock that the caller holds.
        """
        files = []
        for entry in os.scandir(self.folder):
            if OURS.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.name))
        total = sum(size for _, size, _ in files)
        if total <= limit:
            return True
        for _, size, name in sorted(files):
            if total <= limit:
                break
            # a download in progress holds its lock; one that does not was killed
            needs_lock = name.endswith(PART) and _bucket(name) != held
            with self._locked(name, wait=False) if needs_lock else contextlib.nullcontext(True) as free:
                if free:
                    (self.folder / f"{name}{DAMAGED}").unlink(missing_ok=True)
                    (self.folder / name).unlink(missing_ok=True)
                    total -= size
        return total <= limit

    @contextlib.contextmanager
    def _locked(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of ``key``. Without ``wait``, yield False if another process holds it."""
        path = self.folder / LOCKS / _bucket(key)
        path.parent.mkdir(parents=True, exist_ok=True)  # a cleaner of temporary files may have removed it
        with locked(path, wait=wait) as mine:
            yield mine

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert an OSError (a full disk, for example) to a FileError: it is not a data fault."""
        try:
            yield
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> FileError:
        return FileError(f"the data cache {self.folder}: {error.strerror}")


def _bucket(key: str) -> str:
    """Return the name of a key's lock, one of 4,096. Locks are never removed."""
    return key[:3] if key != ROOM else key


def _write(path: Path, blocks: Iterator[bytes]) -> int:
    """Write the blocks and return their checksum."""
    found = 0
    with path.open("r+b") as file:
        for block in blocks:
            found = zlib.crc32(block, found)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return found
