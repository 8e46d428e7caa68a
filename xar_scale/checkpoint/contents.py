"""The values of checkpoints, read block by block: non-finite elements, and differences between two checkpoints."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from xar_scale.checkpoint.chunks import ChunkReader
from xar_scale.checkpoint.manifest import Checkpoint
from xar_scale.checkpoint.vectors import open_vectors, sizes


@dataclass(frozen=True)
class Difference:
    """How one vector differs between two checkpoints. ``relative``: norm of the difference over that of the first vector."""

    key: str
    differing: int  # elements that are not bitwise equal
    elements: int
    largest: float  # absolute difference; NaN if either checkpoint holds one
    relative: float


def not_finite(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the number of non-finite elements of each vector that has any. Raises DataError if a file is malformed."""
    found: dict[str, int] = {}
    with open_vectors(checkpoint) as files:
        for key, elements in sizes(checkpoint).items():
            count = sum(block.numel() - int(block.isfinite().sum()) for block in files.blocks(key, elements))
            found |= {key: count} if count else {}
    return found


def differences(one: Checkpoint, other: Checkpoint) -> Iterator[Difference]:
    """Compare every vector that both hold in the same size. Raises DataError if a file is malformed."""
    theirs = sizes(other)
    with open_vectors(one) as files, open_vectors(other) as other_files:
        for key, elements in sizes(one).items():
            if theirs.get(key) == elements:
                yield _difference(key, elements, files, other_files)


def _difference(key: str, elements: int, files: ChunkReader, other_files: ChunkReader) -> Difference:
    differing, largest, square, norm = 0, 0.0, 0.0, 0.0
    for a, b in zip(files.blocks(key, elements), other_files.blocks(key, elements), strict=True):
        norm += _square(a)
        same = a.view(torch.int32) == b.view(torch.int32)
        if not same.all():
            gap = a.sub_(b).masked_fill_(same, 0)  # equal infinities too: their difference is NaN
            differing += same.numel() - int(same.sum())
            largest = max((largest, gap.abs().max().item()), key=lambda value: (math.isnan(value), value))
            square += _square(gap)
    relative = 0.0 if square == 0 else math.sqrt(square / norm) if norm else math.inf
    return Difference(key, differing, elements, largest, relative)


def _square(block: torch.Tensor) -> float:
    """Squared norm, summed in float64."""
    return torch.linalg.vector_norm(block, dtype=torch.float64).item() ** 2


def changes(one: Checkpoint, other: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Return the manifest entries that differ: key (nested keys joined by dots) -> old and new value, None if missing."""
    old, new = (_flat(_described(checkpoint)) for checkpoint in (one, other))
    return {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest, without what follows from the vectors themselves."""
    manifest = checkpoint.manifest
    values = vars(manifest) | {"guard": manifest.guard.to_dict(), "position": manifest.position._asdict()}
    return {key: value for key, value in values.items() if key != "files"}


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat
