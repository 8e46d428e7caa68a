"""Access to the files of a set: the protocol, and its implementation for a local folder (for URLs: remote.py)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from xar_scale.errors import DataError, FileError

FileSpec = tuple[str, int | None, int]  # of a file: name, size if known, CRC-32


class MissingFileError(DataError):
    """A file does not exist."""


class File(Protocol):
    """A shard's tar opened for reading."""

    name: str  # for messages

    def pread(self, size: int, begin: int) -> bytes:
        """Return ``size`` bytes starting at ``begin``, fewer at the end of the file. Raises FileError."""


class Storage(Protocol):
    """Files by name.

    Methods raise MissingFileError for a missing file, DataError for another size or content than described, and FileError if
    the system or the store fails to deliver a file that may well exist.
    """

    def path(self, name: str) -> str:
        """Return the full name of a file, for messages."""

    def read(self, name: str) -> bytes:
        """Return the content of a small file, as it is now."""

    def read_immutable(self, name: str, crc32: int) -> bytes:
        """Return the content of a small file that does not change. The reader still checks it."""

    def open(self, name: str, size: int, crc32: int) -> File: ...

    def discard(self, name: str, crc32: int) -> bool:
        """Remove a copy that may have been corrupted. Return whether there was one, so that reading again may help."""

    def prefetch(self, files: Sequence[FileSpec]) -> None:
        """Start to fetch files that will be needed; return at once."""


class LocalFolder:
    """A folder whose files are read in place."""

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
    """A file descriptor, closed when the object is no longer referenced."""

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
