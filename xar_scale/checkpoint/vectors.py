"""The vectors of a checkpoint of ours, wherever in its files each range of them lies."""

import json
from collections import defaultdict

import torch

from xar_scale.checkpoint.manifest import Checkpoint
from xar_scale.checkpoint.pieces import FLOAT32, Piece, Pieces, read_header
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
    if missing := set(kinds) - set(checkpoint.manifest.kinds):
        raise DataError(f"checkpoint {checkpoint.path} holds {', '.join(checkpoint.manifest.kinds)}, and no {min(missing)}")
    pieces: dict[str, list[Piece]] = defaultdict(list)
    headers = 0
    for name in checkpoint.manifest.files:
        path = checkpoint.path / name
        try:
            header, offset = read_header(path)
            starts = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
            for key, entry in header.items():
                (start,), (elements,), (begin, end) = starts[key]["saved_offsets"], entry["shape"], entry["data_offsets"]
                if entry["dtype"] != "F32" or end - begin != FLOAT32 * elements:
                    raise ValueError
                pieces[key].append(Piece(start, start + elements, path, offset + begin))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path} is not a file of flat float32 vectors") from None
        headers += offset
    shapes = shapes_of(checkpoint)
    if lacking := set(shapes) - set(pieces):
        raise DataError(f"the files of {checkpoint.path} lack {len(lacking)} vectors, first {min(lacking)}")
    opened = Pieces({key: pieces[key] for key in shapes}, shapes)
    opened.bytes_read += headers
    return opened
