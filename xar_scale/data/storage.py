"""Where the files of a set lie, seen by its reader; here a folder of this machine's file systems (see remote.py)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from xar_scale.errors import DataError, FileError

FileSpec = tuple[str, int | None, int]  # a file: its name, its size where that is known, its CRC-32


class MissingFileError(DataError):
    """A file is not there."""


class File(Protocol):
    """A shard's tar opened for reading."""

    name: str  # for messages

    def pread(self, size: int, begin: int) -> bytes:
        """``size`` bytes from ``begin`` on, fewer where the file ends. Raises FileError."""


class Storage(Protocol):
    """Files by name.

    Raises DataError for what is not as described: MissingFileError, and for another size or content; FileError where the
    system, or a store, does not give what may well be there.
    """

    def path(self, name: str) -> str:
        """Of a file, for messages."""

    def read(self, name: str) -> bytes:
        """A small file, whole, as it is now."""

    def read_immutable(self, name: str, crc32: int) -> bytes:
        """A small file, whole, whose content is known not to change. The reader checks it all the same."""

    def open(self, name: str, size: int, crc32: int) -> File: ...

    def discard(self, name: str, crc32: int) -> bool:
        """Whether what was read was a copy that may have rotted, and has been thrown away: reading again may bring better."""

    def prefetch(self, files: Sequence[FileSpec]) -> None:
        """These files will be needed; returns at once."""


class LocalFolder:
    """A folder: its files are read where they lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise MissingFileError(f"{self.folder / name} is missing") from None
        except OSError as error:
            raise FileError(f"cannot read {self.folder / name}: {error.strerror}") from None

    def read_immutable(self, name: str, crc32: int) -> bytes:
        return self.read(name)

    def open(self, name: str, size: int, crc32: int) -> "OpenFile":
        self.check_size(name, size)
        try:
            return OpenFile(self.folder / name)
        except OSError as error:
            raise FileError(f"cannot read shard {self.folder / name}: {error.strerror}") from None

    def check_size(self, name: str, size: int) -> None:
        path = self.folder / name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise MissingFileError(f"shard {path} is missing") from None
        except OSError as error:
            raise FileError(f"cannot read shard {path}: {error.strerror}") from None
        if found != size:
            what = "truncated" if found < size else "changed"
            raise DataError(f"shard {path} is {what}: {found} bytes, the index says {size}")

    def discard(self, name: str, crc32: int) -> bool:
        return False

    def prefetch(self, files: Sequence[FileSpec]) -> None:
        pass


class OpenFile:
    """A descriptor, closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.descriptor = os.open(path, os.O_RDONLY)

    def pread(self, size: int, begin: int) -> bytes:
        try:
            return os.pread(self.descriptor, size, begin)
        except OSError as error:
            raise FileError(f"cannot read shard {self.name}: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
