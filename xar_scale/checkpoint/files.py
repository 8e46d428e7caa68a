"""Write ranges of flat float32 vectors to safetensors files, and hash them while writing.

The layout is that of PyTorch's DCP with safetensors storage: one one-dimensional entry per vector, and under
``DCP_SHARDING_INFO`` its offset in the vector. So DCP's own reader reads these files too (torch 2.11 to 2.15).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from xar_scale.files import path_in_errors
from xar_scale.validation import Count

SUFFIX = ".safetensors"
BLOCK = 1 << 23  # bytes hashed or written at a time
FLOAT32 = 4  # bytes


class Range(NamedTuple):
    """Elements [start, start + len(values)) of the vector ``key``."""

    key: str
    start: int
    values: Tensor  # 1-D, float32, on the CPU


@dataclass(frozen=True)
class Fingerprint:
    """Size in bytes and SHA-256 of a file."""

    bytes: Count
    sha256: str


def file_name(number: int) -> str:
    """Return the name of the file that rank ``number`` writes. DCP counts from 1."""
    return f"shard-{number + 1:05d}-model-00001-of-00001{SUFFIX}"


def header_of(spans: Mapping[str, tuple[int, int]]) -> bytes:
    """Return the header of a file that holds elements [start, stop) of each vector, in the order of ``spans``."""
    offsets = json.dumps({key: {"saved_offsets": [start]} for key, (start, _) in spans.items()})
    shapes = {key: (stop - start,) for key, (start, stop) in spans.items()}
    return safetensors_header(shapes, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": offsets})


def safetensors_header(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file of float32 tensors, which follow it in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + FLOAT32 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(path: Path, ranges: Sequence[Range]) -> Fingerprint:
    """Write ``ranges`` and flush them to disk. The fingerprint is of the bytes given, not of what the disk stored."""
    spans = {part.key: (part.start, part.start + part.values.numel()) for part in ranges}
    return write_blocks(path, spans, (part.values for part in ranges))


def write_blocks(path: Path, spans: Mapping[str, tuple[int, int]], values: Iterable[Tensor]) -> Fingerprint:
    """The same for ``values`` that arrive one after another, in blocks of any size, in the order of ``spans``."""
    digest = hashlib.sha256()
    with path_in_errors(path), path.open("wb", buffering=0) as file:
        for view in chain([memoryview(header_of(spans))], map(_bytes_of, values)):
            for begin in range(0, len(view), BLOCK):
                block = view[begin : begin + BLOCK]
                digest.update(block)
                while block:  # a write may be partial
                    block = block[file.write(block) :]
        size = file.tell()
        os.fsync(file.fileno())
    return Fingerprint(size, digest.hexdigest())


def fingerprint(path: Path, progress: Callable[[int], object] = lambda count: None) -> Fingerprint:
    """Return the fingerprint of a file as it is now. ``progress`` gets the number of bytes of each block."""
    with path.open("rb", buffering=0) as file:
        digest, size = hashlib.sha256(), 0
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
            progress(len(block))
    return Fingerprint(size, digest.hexdigest())


def _bytes_of(vector: Tensor) -> memoryview:
    """The vector's memory, without a copy."""
    return memoryview(vector.numpy()).cast("B")  # type: ignore[arg-type]
