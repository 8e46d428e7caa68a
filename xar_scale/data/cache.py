"""The cache of a node: whole files of a bounded size together, shared by any number of processes through files and locks."""

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
PART, DAMAGED = ".part", ".damaged"  # behind a key: a file that is being downloaded; a mark that the whole file is damaged
OURS = re.compile(rf"[0-9a-f]{{40}}({PART})?")  # nothing else is ever removed, but for a file's mark
ROOM_WAIT_S = 0.1


class Download(NamedTuple):
    """A file on its way."""

    size: int
    blocks: Iterator[bytes]


class ContentError(Exception):
    """What came is not what was described."""


class NodeCache:
    """Files by key, in a folder of their own below the one that is named, of at most ``limit`` bytes together.

    One process downloads a file while the others wait for it; the files used longest ago make room. A download takes its
    room before it begins. Locks are the system's and end with their process, so that nothing is left locked by a kill. Of jobs
    that share a cache each keeps to its own limit.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises FileError where the folder cannot be made."""
        self.folder, self.limit = folder / FOLDER, limit
        self._folder = str(self.folder)  # a Path takes microseconds to add a name to, for each sample
        with self._errors():
            (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)

    def open(self, key: str, crc32: int, download: Callable[[], Download], *, damaged: bool = False) -> int:
        """A descriptor of the file, downloaded where it is not there. It stays readable whatever becomes of the file.

        Raises ContentError where what came does not have the checksum, unless a ``damaged`` one will do; FileError where it
        cannot be written or read; and what ``download`` raises.
        """
        with self._errors():
            if (descriptor := self.open_copy(key)) is not None:
                return descriptor
            with self._locked(key):
                if (descriptor := self.open_copy(key)) is not None:  # another process was at it
                    return descriptor
                source = download()
                with self._room(key, source.size) as temporary:
                    right = _write(temporary, source.blocks) == crc32
                    if not (right or damaged):
                        raise ContentError(f"its checksum is not {crc32:08x}, as in the set")
                    mark = self.folder / f"{key}{DAMAGED}"
                    mark.unlink(missing_ok=True) if right else mark.touch()
                    # opened before it can be removed again. And who counts what is here may overlook a file that gets another
                    # name just then
                    descriptor = os.open(temporary, os.O_RDONLY)
                    with self._locked(ROOM):
                        temporary.replace(self.folder / key)
                    return descriptor

    def open_copy(self, key: str) -> int | None:
        """A descriptor of the file, if it is there; its use is noted."""
        try:
            descriptor = os.open(f"{self._folder}/{key}", os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from None
        with contextlib.suppress(OSError):  # of another user's file, say, which may be read, no more
            os.utime(descriptor)
        return descriptor

    def touch(self, key: str) -> bool:
        """Note that the file is used, if it is there."""
        try:
            os.utime(f"{self._folder}/{key}")
        except FileNotFoundError:
            return False
        except OSError:  # another user's file, say
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
        """Remove the file, unless it is known to be no better in the place that it came from."""
        if (self.folder / f"{key}{DAMAGED}").exists():
            return False
        with self._errors():
            (self.folder / key).unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def _room(self, key: str, size: int) -> Iterator[Path]:
        """An empty file of ``size`` bytes, for the one who has the key's lock; waits until there is room for it."""
        if size > self.limit:
            raise FileError(
                f"the data cache {self.folder} is limited to {self.limit:,} bytes, a file has {size:,}: data.cache_gb"
            )
        temporary = self.folder / f"{key}{PART}"
        temporary.unlink(missing_ok=True)  # who began it was killed
        try:
            while not self._reserve(temporary, size):
                time.sleep(ROOM_WAIT_S)  # all that is here is being downloaded: it will be whole, and may then go
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
        """Remove files, those used longest ago first, until at most ``limit`` bytes are left; False where that cannot be.

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
            # a download that is under way holds its lock; one that does not was killed
            needs_lock = name.endswith(PART) and _bucket(name) != held
            with self._locked(name, wait=False) if needs_lock else contextlib.nullcontext(True) as free:
                if free:
                    (self.folder / f"{name}{DAMAGED}").unlink(missing_ok=True)
                    (self.folder / name).unlink(missing_ok=True)
                    total -= size
        return total <= limit

    @contextlib.contextmanager
    def _locked(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock that ``key`` falls to; without waiting it may be False, and another's."""
        path = self.folder / LOCKS / _bucket(key)
        path.parent.mkdir(parents=True, exist_ok=True)  # a cleaner of temporary files may have been at it
        with locked(path, wait=wait) as mine:
            yield mine

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the system says (a full disk, say) is no fault of the data."""
        try:
            yield
        except OSError as error:
            raise self._error(error) from None

    def _error(self, error: OSError) -> FileError:
        return FileError(f"the data cache {self.folder}: {error.strerror}")


def _bucket(key: str) -> str:
    """The name of a key's lock, of 4,096: they are never removed."""
    return key[:3] if key != ROOM else key


def _write(path: Path, blocks: Iterator[bytes]) -> int:
    """Returns the checksum of what came."""
    found = 0
    with path.open("r+b") as file:
        for block in blocks:
            found = zlib.crc32(block, found)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return found
