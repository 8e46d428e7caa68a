"""Files that are there whole or not at all, also after a crash."""

import contextlib
import itertools
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Either the old file or the whole new one is there at any moment, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # the room that it takes may be what others lack
        raise


def sync_folder(path: Path) -> None:
    """Make renames and new entries of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(path: Path) -> Path:
    """``path``, or where something is there already, with a number after its stem."""
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return path if not path.exists() else next(name for name in numbered if not name.exists())
