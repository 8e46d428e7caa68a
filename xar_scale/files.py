"""Files that are there whole or not at all, also after a crash."""

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def make_folder(path: Path) -> None:
    """Raises OSError that names it where it cannot be, or takes no files: before the work whose result it is for."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(dir=path)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Around reading or writing ``path``: of a disk that is full or broken the system's error names no file."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Either the old file or the whole new one is there at any moment, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # the room that it takes may be what others lack
        raise OSError(error.errno, error.strerror, str(path)) from None  # the system names no file where it is full


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the system's lock of a file, which ends with the process. Without waiting it may be False, and another's."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
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


def remove(path: Path) -> None:
    """A folder with all that is in it, or whatever else is there: of a link not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync_folder(path: Path) -> None:
    """Make renames and new entries of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with path_in_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(path: Path) -> Path:
    """``path``, or where something is there already, with a number after its stem."""
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return path if not path.exists() else next(name for name in numbered if not name.exists())
