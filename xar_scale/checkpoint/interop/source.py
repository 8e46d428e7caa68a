"""What every format is read as: flat float32 vectors by name, a range at a time, wherever in whichever files they lie."""

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from xar_scale.checkpoint.files import BLOCK
from xar_scale.checkpoint.manifest import KINDS, Manifest
from xar_scale.errors import DataError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # which float32 holds exactly
OPEN_FILES = 64  # at once


class Piece(NamedTuple):
    """Elements [start, stop) of a vector, as they lie in a file."""

    start: int
    stop: int
    path: Path
    offset: int  # bytes
    dtype: torch.dtype = torch.float32


class Reader(Protocol):
    """Where values come from."""

    def read(self, key: str, start: int, out: Tensor) -> None: ...

    def close(self) -> None: ...


@dataclass
class Source:
    """A checkpoint of any format; a context manager, which may have files open.

    Keys are ``KIND/NAME``; kinds are model, ema, exp_avg, exp_avg_sq.
    """

    path: Path
    format: str  # in words
    shapes: dict[str, torch.Size]
    reader: Reader
    files: list[Path]  # that values are read from
    checksums: dict[Path, str] = field(default_factory=dict)  # SHA-256, of files of which it is known
    step: int | None = None  # steps of training
    taken: int | None = None  # of them, those that the moments have seen
    groups: list[dict[str, Any]] = field(default_factory=list)  # settings of the optimizer's parameter groups
    manifest: Manifest | None = None  # of a checkpoint of ours

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of which there is anything."""
        found = {key.partition("/")[0] for key in self.shapes}
        return tuple(kind for kind in KINDS if kind in found)

    def names(self, kind: str) -> dict[str, torch.Size]:
        """Names and shapes of one kind."""
        return {key.partition("/")[2]: shape for key, shape in self.shapes.items() if key.startswith(f"{kind}/")}

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D, float32, contiguous, on the CPU) with the elements from ``start`` on. Raises DataError."""
        self.reader.read(key, start, out)

    def whole(self, key: str) -> Tensor:
        """All of a vector, in its shape."""
        tensor = torch.empty(self.shapes[key])
        self.read(key, 0, tensor.view(-1))
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.reader.close()


class Pieces:
    """Reads vectors that lie in pieces. Raises DataError where they are not whole, or a file is too short for them."""

    def __init__(self, pieces: Mapping[str, Sequence[Piece]], shapes: Mapping[str, torch.Size]) -> None:
        self.pieces = {key: sorted(piece for piece in given if piece.stop > piece.start) for key, given in pieces.items()}
        self._open: dict[Path, int] = {}
        self.files = sorted({piece.path for given in self.pieces.values() for piece in given})
        sizes = {path: path.stat().st_size for path in self.files}
        for key, given in self.pieces.items():
            at = 0
            for piece in given:
                if piece.start != at:
                    raise DataError(f"{piece.path}: {key} goes on at element {piece.start}, the pieces before end at {at}")
                if piece.dtype not in DTYPES:
                    raise DataError(f"{piece.path}: {key} is {piece.dtype}; float32, bfloat16 and float16 are read")
                end = piece.offset + piece.dtype.itemsize * (piece.stop - piece.start)
                if end > sizes[piece.path]:
                    raise DataError(f"{piece.path} has {sizes[piece.path]} bytes, {key} ends at {end}: it is torn")
                at = piece.stop
            if at != shapes[key].numel():
                raise DataError(f"{key} of shape {tuple(shapes[key])} has {shapes[key].numel()} elements, its files hold {at}")

    def read(self, key: str, start: int, out: Tensor) -> None:
        pieces, stop = self.pieces[key], start + out.numel()
        for piece in pieces[max(bisect_right(pieces, start, key=lambda piece: piece.start) - 1, 0) :]:
            if start >= stop:
                return
            end = min(stop, piece.stop)
            self._fill(piece, start, out[: end - start])
            out, start = out[end - start :], end

    def _fill(self, piece: Piece, start: int, out: Tensor) -> None:
        """Part of a piece, through a block of its own type where that is not float32."""
        size = piece.dtype.itemsize
        for begin in range(0, out.numel(), BLOCK // size):
            target = out[begin : begin + BLOCK // size]
            block = target if piece.dtype is torch.float32 else torch.empty(target.shape, dtype=piece.dtype)
            self._pread(piece.path, piece.offset + size * (start + begin - piece.start), block)
            if block is not target:
                target.copy_(block)

    def _pread(self, path: Path, offset: int, block: Tensor) -> None:
        view = memoryview(block.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while view:
            got = os.preadv(self._descriptor(path), [view], offset)
            if got == 0:
                raise DataError(f"{path} ends too early")
            view, offset = view[got:], offset + got

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) == OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class InMemory:
    """Reads vectors from tensors that are there already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, key: str, start: int, out: Tensor) -> None:
        out.copy_(self.tensors[key].reshape(-1)[start : start + out.numel()])

    def close(self) -> None:
        pass
