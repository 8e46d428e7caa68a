"""File operations that leave a complete file or none, even after a crash."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def make_folder(path: Path) -> None:
    """Make a folder and try to create a file in it, before the work whose result goes there. Raises OSError naming it."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, name = tempfile.mkstemp(dir=path)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Name ``path`` in OSErrors while it is read or written: those of a full or broken disk name no file."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file. At any moment, even after a crash, either the old file or the complete new one is there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb", opener=_no_link) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # others may need the space
        raise OSError(error.errno, error.strerror, str(path)) from None  # the system names no file if the disk is full


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the system's lock on a file; it ends with the process. Yields False if, without ``wait``, another process has it."""
    descriptor = _no_link(path, os.O_RDWR | os.O_CREAT)
    mine = False
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        yield mine
    finally:
        if mine:  # closing is not enough if a process forked meanwhile: it has the descriptor too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _no_link(path: str | Path, flags: int) -> int:
    """Open a file, but not through a link: in a folder that others may write to, it could name any file of this user's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def own_temporary_folder() -> Path:
    """Return this user's folder for temporary files on this node, made if there is none. Raises OSError if it is somebody
    else's, or others may write to it: what is in it could not be trusted."""
    folder = Path(tempfile.gettempdir(), f"xar_scale-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, "it is another user's, or others may write to it", str(folder))
    return folder


def remove(path: Path) -> None:
    """Remove a folder and its contents, or any other file. A symbolic link is removed, its target is not."""
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


def publish(folder: Path, final: Path) -> None:
    """Give a finished folder, whose files are on disk, its final name, durably."""
    sync_folder(folder)
    folder.rename(final)
    sync_folder(final.parent)


def is_entry_name(name: Any) -> bool:
    """Whether ``name``, read from a file, names an entry of a folder and cannot lead out of it."""
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def free_name(path: Path) -> Path:
    """Return ``path``, or, if it exists, the first unused name with a number after the stem."""
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return path if not path.exists() else next(name for name in numbered if not name.exists())


def parse_json(content: bytes | str) -> Any:
    """Return JSON's value. Raises ValueError, also for text that is nested too deeply for the parser."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
