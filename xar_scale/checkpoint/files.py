"""Flat float32 vectors in safetensors files, cut anywhere: written while they are hashed, read a range at a time.

A file holds ranges of vectors, as PyTorch's DCP writes them with safetensors storage: a one-dimensional entry a vector, and
under ``DCP_SHARDING_INFO`` where in the vector it begins. So DCP's own reader reads these files too (torch 2.11 to 2.15).
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from xar_scale.errors import DataError

SUFFIX = ".safetensors"
BLOCK = 1 << 23  # bytes hashed or written at once
MAX_HEADER = 1 << 28  # bytes; beyond it the length is no length
FLOAT32 = 4  # bytes


class Range(NamedTuple):
    """Elements [start, start + len(values)) of the vector ``key``."""

    key: str
    start: int
    values: Tensor  # 1-D, float32, on the CPU


@dataclass(frozen=True)
class Fingerprint:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


def file_name(number: int) -> str:
    """Of the file that rank ``number`` writes; DCP counts them from 1."""
    return f"shard-{number + 1:05d}-model-00001-of-00001{SUFFIX}"


def header_of(cuts: Mapping[str, tuple[int, int]]) -> bytes:
    """The header of a file with elements [start, stop) of each vector, one after another in the order of ``cuts``."""
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps({key: {"saved_offsets": [start]} for key, (start, _) in cuts.items()}),
        }
    }
    offset = 0
    for key, (start, stop) in cuts.items():
        end = offset + FLOAT32 * (stop - start)
        entries[key] = {"dtype": "F32", "shape": [stop - start], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, ranges: Sequence[Range]) -> Fingerprint:
    """Write and flush to disk. The fingerprint is of what was meant to be written, not of what the disk made of it."""
    cuts = {part.key: (part.start, part.start + part.values.numel()) for part in ranges}
    return write_blocks(path, cuts, (part.values for part in ranges))


def write_blocks(path: Path, cuts: Mapping[str, tuple[int, int]], values: Iterable[Tensor]) -> Fingerprint:
    """The same of ``values`` that come one after another, in blocks of any size, as ``header_of`` has it."""
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for view in chain([memoryview(header_of(cuts))], map(_bytes_of, values)):
            for begin in range(0, len(view), BLOCK):
                block = view[begin : begin + BLOCK]
                digest.update(block)
                while block:  # a write may be cut short
                    block = block[file.write(block) :]
        size = file.tell()
        os.fsync(file.fileno())
    return Fingerprint(size, digest.hexdigest())


def fingerprint(path: Path) -> Fingerprint:
    """Of a file as it is now."""
    with path.open("rb", buffering=0) as file:
        digest, size = hashlib.sha256(), 0
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return Fingerprint(size, digest.hexdigest())


def _bytes_of(vector: Tensor) -> memoryview:
    """Its memory."""
    return memoryview(vector.numpy()).cast("B")  # type: ignore[arg-type]


class _Piece(NamedTuple):
    start: int  # elements of the vector
    stop: int
    file: int  # descriptor
    offset: int  # bytes


class VectorFiles:
    """The vectors in files ``names`` of ``folder``; a context manager, which has the files open.

    ``bytes_read`` counts all that was read, headers too. Raises DataError, naming the file, where one cannot be what it says.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder, self.bytes_read = folder, 0
        self.pieces: dict[str, list[_Piece]] = {}
        self._open: dict[int, str] = {}
        try:
            for name in names:
                self._add(name)
        except BaseException:
            self.close()
            raise
        for pieces in self.pieces.values():
            pieces.sort()

    def _add(self, name: str) -> None:
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        self._open[descriptor] = name
        try:
            length = int.from_bytes(self._pread(descriptor, 0, 8), "little")
            if length > MAX_HEADER:
                raise ValueError
            header = json.loads(self._pread(descriptor, 8, length))
            starts = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
            for key, entry in header.items():
                (start,), (elements,) = starts[key]["saved_offsets"], entry["shape"]
                begin, end = entry["data_offsets"]
                if entry["dtype"] != "F32" or end - begin != FLOAT32 * elements:
                    raise ValueError
                self.pieces.setdefault(key, []).append(_Piece(start, start + elements, descriptor, 8 + length + begin))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{self.folder / name} is not a file of flat float32 vectors") from None

    def _pread(self, descriptor: int, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        self._fill(descriptor, offset, memoryview(buffer))
        return bytes(buffer)

    def _fill(self, descriptor: int, offset: int, view: memoryview) -> None:
        while view:
            got = os.preadv(descriptor, [view[:BLOCK]], offset)
            if got == 0:
                raise DataError(f"{self.folder / self._open[descriptor]} ends too early")
            view, offset = view[got:], offset + got
            self.bytes_read += got

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D, float32, contiguous, on the CPU) with the elements from ``start`` on, reading no others."""
        pieces, stop = self.pieces.get(key, []), start + out.numel()
        target = _bytes_of(out)
        at = max(bisect_right(pieces, start, key=lambda piece: piece.start) - 1, 0)
        while start < stop and at < len(pieces) and pieces[at].start <= start:
            piece, at = pieces[at], at + 1
            if (end := min(stop, piece.stop)) > start:
                size = FLOAT32 * (end - start)
                self._fill(piece.file, piece.offset + FLOAT32 * (start - piece.start), target[:size])
                target, start = target[size:], end
        if start < stop:
            raise DataError(f"{self.folder} has no element {start} of {key}")

    def blocks(self, key: str, elements: int) -> Iterator[Tensor]:
        """All of a vector, a block at a time, each in the memory of the one before."""
        buffer = torch.empty(min(elements, BLOCK // FLOAT32))
        for start in range(0, elements, BLOCK // FLOAT32):
            out = buffer[: elements - start]
            self.read(key, start, out)
            yield out

    def whole(self, key: str, shape: Sequence[int]) -> Tensor:
        """All of a vector, as a tensor of ``shape``."""
        tensor = torch.empty(tuple(shape))
        self.read(key, 0, tensor.view(-1))
        return tensor

    def close(self) -> None:
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
