"""The vectors of a checkpoint of ours, wherever in its files each range of them lies."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from xar_scale.checkpoint.manifest import Checkpoint
from xar_scale.checkpoint.pieces import FLOAT32, Piece, Pieces, read_header, whole
from xar_scale.errors import DataError


def shapes_of(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Of what each vector is, by key."""
    manifest = checkpoint.manifest
    return {f"{kind}/{name}": torch.Size(shape) for kind in manifest.kinds for name, shape in manifest.shapes.items()}


def sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Elements of each vector, by key."""
    return {key: shape.numel() for key, shape in shapes_of(checkpoint).items()}


def open_vectors(checkpoint: Checkpoint, *kinds: str) -> Pieces:
    """Raises DataError where the checkpoint lacks one of ``kinds``, or a file is not what it says or too short."""
    check_kinds(checkpoint, kinds)
    return _open(checkpoint, whole(shapes_of(checkpoint)), [*checkpoint.manifest.files])


def open_ranges(checkpoint: Checkpoint, spans: Mapping[str, tuple[int, int]], rank: int, world: int) -> Pieces:
    """Of vectors the elements [start, stop) that ``rank`` of ``world`` owns. Files are looked into until these are found, first
    those of ranks that owned as much before: of hundreds of files, each with all vectors' names, mostly one or two.

    Raises DataError where they lack some, or a file is not what it says or too short.
    """
    check_kinds(checkpoint, {key.partition("/")[0] for key in spans})
    names = sorted(checkpoint.manifest.files)
    place = (rank + 0.5) / world * len(names)
    return _open(checkpoint, spans, [names[at] for at in sorted(range(len(names)), key=lambda at: abs(at + 0.5 - place))])


def check_kinds(checkpoint: Checkpoint, kinds: Iterable[str]) -> None:
    if missing := set(kinds) - set(checkpoint.manifest.kinds):
        raise DataError(f"checkpoint {checkpoint.path} holds {', '.join(checkpoint.manifest.kinds)}, and no {min(missing)}")


def _open(checkpoint: Checkpoint, spans: Mapping[str, tuple[int, int]], names: Sequence[str]) -> Pieces:
    pieces: dict[str, list[Piece]] = {key: [] for key in spans}
    missing = {key: stop - start for key, (start, stop) in spans.items()}
    for name in names:
        for key, piece in _pieces_of(checkpoint.path / name):
            if key in missing and (part := _within(piece, *spans[key])):
                pieces[key].append(part)
                missing[key] -= part.stop - part.start
        if not any(missing.values()):
            break
    if lacking := [key for key, given in pieces.items() if not given]:
        raise DataError(f"the files of {checkpoint.path} lack {len(lacking)} vectors, first {min(lacking)}")
    return Pieces(pieces, spans)


def _pieces_of(path: Path) -> Iterator[tuple[str, Piece]]:
    try:
        header, offset = read_header(path)
        starts = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        for key, entry in header.items():
            (start,), (elements,), (begin, end) = starts[key]["saved_offsets"], entry["shape"], entry["data_offsets"]
            if entry["dtype"] != "F32" or end - begin != FLOAT32 * elements:
                raise ValueError
            yield key, Piece(start, start + elements, path, offset + begin)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is not a file of flat float32 vectors") from None


def _within(piece: Piece, start: int, stop: int) -> Piece | None:
    """The part of a piece that lies in [start, stop)."""
    begin, end = max(piece.start, start), min(piece.stop, stop)
    return piece._replace(start=begin, stop=end, offset=piece.offset + FLOAT32 * (begin - piece.start)) if begin < end else None
