"""Locate the vectors of an xar-scale checkpoint in its files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from xar_scale.checkpoint.chunks import FLOAT32, Chunk, ChunkReader, full_spans, located, read_header
from xar_scale.checkpoint.manifest import Checkpoint
from xar_scale.errors import DataError
from xar_scale.files import parse_json


def shapes_of(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Return the shape of each vector's parameter, by key."""
    manifest = checkpoint.manifest
    return {f"{kind}/{name}": torch.Size(shape) for kind in manifest.kinds for name, shape in manifest.shapes.items()}


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the number of elements of each vector, by key."""
    return {key: shape.numel() for key, shape in shapes_of(checkpoint).items()}


def open_vectors(checkpoint: Checkpoint, *kinds: str) -> ChunkReader:
    """Open all vectors. Raises DataError if the checkpoint lacks one of ``kinds``, or a file is malformed or too short."""
    check_kinds(checkpoint, kinds)
    return _open(checkpoint, full_spans(shapes_of(checkpoint)), [*checkpoint.manifest.files])


def open_ranges(checkpoint: Checkpoint, spans: Mapping[str, tuple[int, int]], rank: int, world: int) -> ChunkReader:
    """Open the elements [start, stop) of vectors that ``rank`` of ``world`` owns.

    Headers, each with the names of all vectors, are read until everything is found, starting with the files whose ranks held
    the same part: mostly one or two of hundreds. Raises DataError if elements are missing, or a file is malformed or too short.
    """
    check_kinds(checkpoint, {key.partition("/")[0] for key in spans})
    names = sorted(checkpoint.manifest.files)
    middle = (rank + 0.5) / world * len(names)
    return _open(checkpoint, spans, [names[at] for at in sorted(range(len(names)), key=lambda at: abs(at + 0.5 - middle))])


def check_kinds(checkpoint: Checkpoint, kinds: Iterable[str]) -> None:
    if missing := set(kinds) - set(checkpoint.manifest.kinds):
        raise DataError(f"checkpoint {checkpoint.path} holds {', '.join(checkpoint.manifest.kinds)}, but no {min(missing)}")


def _open(checkpoint: Checkpoint, spans: Mapping[str, tuple[int, int]], names: Sequence[str]) -> ChunkReader:
    chunks: dict[str, list[Chunk]] = {key: [] for key in spans}
    missing = {key: stop - start for key, (start, stop) in spans.items()}
    for name in names:
        for key, chunk in _chunks_in(checkpoint.path / name):
            if key in missing and (part := _within(chunk, *spans[key])):
                chunks[key].append(part)
                missing[key] -= part.stop - part.start
        if not any(missing.values()):
            break
    if lacking := [key for key, given in chunks.items() if not given]:
        raise DataError(f"the files of {checkpoint.path} lack {len(lacking)} vectors, first {min(lacking)}")
    return ChunkReader(chunks, spans)


def _chunks_in(path: Path) -> Iterator[tuple[str, Chunk]]:
    try:
        header, offset = read_header(path)
        starts = parse_json(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        for key, entry in header.items():
            (start,), ((elements,), begin, end) = starts[key]["saved_offsets"], located(entry)
            if type(start) is not int or start < 0 or entry["dtype"] != "F32" or end - begin != FLOAT32 * elements:
                raise ValueError
            yield key, Chunk(start, start + elements, path, offset + begin)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is not a file of flat float32 vectors") from None


def _within(chunk: Chunk, start: int, stop: int) -> Chunk | None:
    """The part of a chunk that lies in [start, stop)."""
    begin, end = max(chunk.start, start), min(chunk.stop, stop)
    return chunk._replace(start=begin, stop=end, offset=chunk.offset + FLOAT32 * (begin - chunk.start)) if begin < end else None
