"""Write a plan into a hidden folder, block by block, and rename it at the end. An interrupted run can be resumed."""

import fcntl
import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from xar_scale.checkpoint.files import BLOCK, FLOAT32, Fingerprint, fingerprint
from xar_scale.checkpoint.interop.pickled import is_pickled
from xar_scale.checkpoint.interop.source import Source
from xar_scale.checkpoint.reshard.parts import Fixed, Output, Plan, Slice
from xar_scale.errors import DataError, FileError, UsageError, is_damage
from xar_scale.files import parse_json, path_in_errors, publish, sync_folder, write_atomically

SYNC = 1 << 28  # bytes between two points from which an interrupted run can resume
JOURNAL = "journal"

Progress = Callable[[int], None]  # bytes done


def verifiable(source: Source) -> list[Path]:
    """Return the files with a known checksum: a SHA-256 next to them, or the CRC-32 inside torch.save's archives."""
    return [path for path in source.files if path in source.checksums or (is_pickled(path) and zipfile.is_zipfile(path))]


def verify_source(source: Source, progress: Progress) -> None:
    """Read the verifiable files. Raises DataError naming the first that differs."""
    for path in verifiable(source):
        if path in source.checksums:
            if fingerprint(path, progress).sha256 != source.checksums[path]:
                raise DataError(f"{path} is corrupt (its SHA-256 differs)")
        else:
            _verify_zip(path)
            progress(path.stat().st_size)


def _verify_zip(path: Path) -> None:
    """Check the CRC-32 of each entry."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:
        if not is_damage(error):
            raise
        raise DataError(f"{path} is torn: {error}") from None
    if bad is not None:
        raise DataError(f"{path}: {bad} is corrupt (its CRC-32 differs)")


def write(source: Source, plan: Plan, destination: Path, verifying: Progress, writing: Progress) -> None:
    """Make ``destination``, which must not exist, or resume making it. Raises FileError if the disk is full."""
    with _Work(destination, _digest(source, plan)) as work:
        if not work.verified:
            verify_source(source, verifying)
            work.record({"verified": True})
        left = sum(output.size for output in plan.outputs if output.name not in work.finished)
        free = shutil.disk_usage(work.files).free + work.partial[1]
        if left > free:
            raise FileError(f"{destination} needs {left:,} more bytes, the disk has {free:,}: free some space and start again")
        for output in plan.outputs:
            if output.name not in work.finished:
                work.write(source, output, writing)
            else:
                writing(output.size)
        work.publish(*plan.last({output.name: work.finished[output.name] for output in plan.outputs}))


def _digest(source: Source, plan: Plan) -> str:
    """Return a digest, equal if a run may resume another: the same unchanged source files, the same output files."""
    sums = source.checksums
    stats = {str(path.resolve()): (path.stat().st_size, path.stat().st_mtime_ns, sums.get(path)) for path in source.files}
    name, content = plan.last({output.name: Fingerprint(output.size, "") for output in plan.outputs})
    facts = [stats, [output.layout() for output in plan.outputs], name, content.decode()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class _Work:
    """The hidden folder next to the destination: the files, and a journal of which of them are safely on disk."""

    def __init__(self, destination: Path, digest: str) -> None:
        self.destination = destination
        self.folder = destination.with_name(f".{destination.name}.partial")
        self.files = self.folder / "files"
        self.finished: dict[str, Fingerprint] = {}
        self.partial = ("", 0)  # an unfinished file, and how many of its bytes are on disk
        self.verified = False
        self._unsynced: list[Output] = []
        self._bytes_unsynced = 0
        self._block = torch.empty(BLOCK // FLOAT32)
        self._view = memoryview(self._block.numpy()).cast("B")  # type: ignore[arg-type]
        self.files.mkdir(parents=True, exist_ok=True)
        self._journal = (self.folder / JOURNAL).open("a+")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {destination}") from None
        if not self._recall(digest):
            shutil.rmtree(self.files)
            self.files.mkdir()
            self._journal.truncate(0)
            self.record({"digest": digest})

    def __enter__(self) -> "_Work":
        return self

    def __exit__(self, *_: object) -> None:
        with path_in_errors(self.folder / JOURNAL):  # closing retries what could not be written
            self._journal.close()

    def _recall(self, digest: str) -> bool:
        """Load the progress of an interrupted run with the same digest. False if there is none."""
        self._journal.seek(0)
        lines = self._journal.readlines()
        if lines and not lines[-1].endswith("\n"):  # torn; the next record needs a line of its own
            self._journal.truncate(sum(map(len, lines[:-1])))  # in bytes too: the JSON is ASCII
            lines.pop()
        try:
            entries = [parse_json(line) for line in lines]
        except ValueError:
            return False
        if not entries or entries[0].get("digest") != digest:
            return False
        for entry in entries[1:]:
            name = entry.get("file", "")
            if "verified" in entry:
                self.verified = True
            elif "sha256" in entry:
                self.finished[name] = Fingerprint(entry["bytes"], entry["sha256"])
            else:
                self.partial = (name, entry["bytes"])
        for name in [name for name, entry in self.finished.items() if not self._has(name, entry.bytes)]:
            del self.finished[name]
        if self.partial[0] in self.finished or not self._has(*self.partial, at_least=True):
            self.partial = ("", 0)
        return True

    def _has(self, name: str, size: int, at_least: bool = False) -> bool:
        path = self.files / name
        found = path.stat().st_size if path.is_file() else -1
        return found >= size if at_least else found == size

    def record(self, *entries: dict[str, object]) -> None:
        with path_in_errors(self.folder / JOURNAL):
            self._journal.write("".join(f"{json.dumps(entry)}\n" for entry in entries))
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def write(self, source: Source, output: Output, progress: Progress) -> None:
        """Write one file. If it is unfinished, what is on disk is read instead of made again."""
        path = self.files / output.name
        path.parent.mkdir(parents=True, exist_ok=True)
        done = self.partial[1] if self.partial[0] == output.name else 0
        digest, sums, at = hashlib.sha256(), list[int](), 0
        with path_in_errors(path), path.open("r+b" if done else "wb", buffering=0) as file:
            for part in output.parts:
                if isinstance(part, Slice):
                    sums.append(0)
                content = None if isinstance(part, Slice) else part.content if isinstance(part, Fixed) else part.make(sums)
                for begin in range(0, part.size, BLOCK):
                    view = self._view[: min(BLOCK, part.size - begin)]
                    if at + len(view) <= done:
                        _read(file, at, view)
                    else:
                        if content is None:
                            source.read(part.key, part.start + begin // FLOAT32, self._block[: len(view) // FLOAT32])  # type: ignore[union-attr]
                        else:
                            view[:] = content[begin : begin + len(view)]
                        _write(file, at, view)
                        self._wrote(file, output, at + len(view), len(view))
                    if content is None:
                        sums[-1] = zlib.crc32(view, sums[-1])
                    digest.update(view)
                    at += len(view)
                    progress(len(view))
        self.finished[output.name] = Fingerprint(at, digest.hexdigest())
        self._unsynced.append(output)

    def _wrote(self, file: BinaryIO, output: Output, done: int, size: int) -> None:
        """Every ``SYNC`` bytes, flush what is written to disk and record it."""
        self._bytes_unsynced += size
        if self._bytes_unsynced >= SYNC:
            self._sync()
            os.fsync(file.fileno())
            self.record({"file": output.name, "bytes": done})

    def _sync(self) -> None:
        for output in self._unsynced:
            path = self.files / output.name
            with path_in_errors(path), path.open("rb") as file:
                os.fsync(file.fileno())
        self.record(*({"file": output.name, **vars(self.finished[output.name])} for output in self._unsynced))
        self._unsynced, self._bytes_unsynced = [], 0

    def publish(self, name: str, content: bytes) -> None:
        """Write the last file and publish all with one rename."""
        self._sync()
        write_atomically(self.files / name, content)
        for folder in sorted({path.parent for path in self.files.rglob("*")}):
            sync_folder(folder)
        publish(self.files, self.destination)
        shutil.rmtree(self.folder)


def _read(file: BinaryIO, offset: int, view: memoryview) -> None:
    file.seek(offset)
    while view:
        view = view[file.readinto(view) :]  # type: ignore[attr-defined]


def _write(file: BinaryIO, offset: int, view: memoryview) -> None:
    file.seek(offset)
    while view:  # a write may be partial
        view = view[file.write(view) :]
