"""Read ranges of vectors stored in files, in chunks of any length and of any dtype that float32 represents exactly."""

import contextlib
import os
import resource
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from xar_scale.checkpoint.files import BLOCK, FLOAT32
from xar_scale.errors import DataError
from xar_scale.files import parse_json, path_in_errors

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # float32 represents all of them exactly
MAX_HEADER = 1 << 28  # bytes; a larger number is not a header length
MAX_BYTES = 1 << 60  # of a file: sizes up to this one do not wrap around in torch
OPEN_FILES = 256  # at a time, of one reader, if the system's limit cannot be raised for more


class Chunk(NamedTuple):
    """Elements [start, stop) of a vector, contiguous in a file."""

    start: int
    stop: int
    path: Path
    offset: int  # bytes
    dtype: torch.dtype = torch.float32


class ChunkReader:
    """Reads vectors from their chunks. A context manager, because it keeps files open. ``bytes_read`` counts what was read.

    ``spans``: the elements [start, stop) that exist of each vector. Raises DataError if the chunks do not cover exactly these,
    or a file is too short.
    """

    def __init__(self, chunks: Mapping[str, Sequence[Chunk]], spans: Mapping[str, tuple[int, int]]) -> None:
        self.chunks = {key: sorted(chunk for chunk in given if chunk.stop > chunk.start) for key, given in chunks.items()}
        self.bytes_read = 0
        self._open: dict[Path, int] = {}
        self.files = sorted({chunk.path for given in self.chunks.values() for chunk in given})
        sizes = {path: path.stat().st_size for path in self.files}
        for key, given in self.chunks.items():
            at, last = spans[key]
            for chunk in given:
                if chunk.start != at:
                    raise DataError(f"{chunk.path}: {key} continues at element {chunk.start}, the chunks before it end at {at}")
                if chunk.dtype not in DTYPES.values():
                    raise DataError(f"{chunk.path}: {key} is {chunk.dtype}; only float32, bfloat16 and float16 are supported")
                end = chunk.offset + chunk.dtype.itemsize * (chunk.stop - chunk.start)
                if end > sizes[chunk.path]:
                    raise DataError(f"{chunk.path} has {sizes[chunk.path]} bytes, {key} ends at {end}: it is truncated")
                at = chunk.stop
            if at != last:
                raise DataError(f"{key} must end at element {last}, but its files end at {at}")
        # a file per rank that wrote, each with a part of every vector: reading them in turn must not open and close them
        self._open_files = max(OPEN_FILES, allow_open_files() // 16)
        try:  # now, because a run that is training may drop the checkpoint: open files stay readable
            for path in self.files[: self._open_files]:
                self._descriptor(path)
        except OSError:
            self.close()
            raise

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D, float32, contiguous, on the CPU) with the elements from ``start`` on. Reads no others."""
        chunks, stop = self.chunks.get(key, ()), start + out.numel()
        if not chunks or chunks[-1].stop < stop:
            raise DataError(f"{key} has no element {stop - 1} in these files: it ends at {chunks[-1].stop if chunks else 0}")
        if start < chunks[0].start:
            raise DataError(f"{key} has no element {start} in these files: it starts at {chunks[0].start}")
        for chunk in chunks[max(bisect_right(chunks, start, key=lambda chunk: chunk.start) - 1, 0) :]:
            if start >= stop:
                return
            end = min(stop, chunk.stop)
            self._fill(chunk, start, out[: end - start])
            out, start = out[end - start :], end

    def _fill(self, chunk: Chunk, start: int, out: Tensor) -> None:
        """Read part of a chunk, through a buffer of its own dtype if that is not float32."""
        size = chunk.dtype.itemsize
        for begin in range(0, out.numel(), BLOCK // size):
            target = out[begin : begin + BLOCK // size]
            block = target if chunk.dtype is torch.float32 else torch.empty(target.shape, dtype=chunk.dtype)
            self._pread(chunk.path, chunk.offset + size * (start + begin - chunk.start), block)
            if block is not target:
                target.copy_(block)

    def _pread(self, path: Path, offset: int, block: Tensor) -> None:
        view = memoryview(block.view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.bytes_read += len(view)
        with path_in_errors(path):
            while view:
                got = os.preadv(self._descriptor(path), [view], offset)
                if got == 0:
                    raise DataError(f"{path} ended unexpectedly")
                view, offset = view[got:], offset + got

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) == self._open_files:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def blocks(self, key: str, elements: int) -> Iterator[Tensor]:
        """Yield all of a vector, block by block, in one buffer that is used again."""
        buffer = torch.empty(min(elements, BLOCK // FLOAT32))
        for start in range(0, elements, BLOCK // FLOAT32):
            out = buffer[: elements - start]
            self.read(key, start, out)
            yield out

    def whole(self, key: str, shape: Sequence[int]) -> Tensor:
        """Return all of a vector as a tensor of ``shape``."""
        tensor = torch.empty(tuple(shape))
        self.read(key, 0, tensor.view(-1))
        return tensor


def allow_open_files() -> int:
    """Raise this process's limit of open files to what the system allows it, usually from 1024. Return the limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError):  # beyond fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft != resource.RLIM_INFINITY else sys.maxsize


def full_spans(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, int]]:
    """Return the span of all elements of each vector."""
    return {key: (0, shape.numel()) for key, shape in shapes.items()}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header (tensors by name, metadata as ``__metadata__``) and the offset of its values.

    Raises ValueError if it is not such a file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError
    return header, 8 + length


def located(entry: Any) -> tuple[list[int], int, int]:
    """Return the shape of a header's tensor, and where its values begin and end. Raises ValueError if these are impossible.

    That the file is long enough is checked when it is opened.
    """
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and 0 <= number <= MAX_BYTES for number in (*shape, begin, end)):
        raise ValueError
    if begin > end:
        raise ValueError
    return shape, begin, end
