"""Weights alone: published ``.pth`` files and safetensors, in one file or several. Published names are mapped to ours."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xar_scale.checkpoint.chunks import DTYPES, Chunk, ChunkReader, full_spans, located, read_header
from xar_scale.checkpoint.files import SUFFIX
from xar_scale.checkpoint.interop.official import our_names
from xar_scale.checkpoint.interop.pickled import is_pickled, read_pickled
from xar_scale.checkpoint.interop.source import InMemory, Source
from xar_scale.errors import DataError
from xar_scale.files import is_entry_name, parse_json

INDEX, PTH = f"model{SUFFIX}.index.json", "model.pth"


def weight_files(path: Path) -> list[Path]:
    """Return the files of ``path``, a weights file or a folder of them; none if it is neither."""
    if path.is_file():
        return [path] if path.suffix == SUFFIX or is_pickled(path) else []
    if (path / INDEX).is_file():
        return [path / name for name in sorted(set(_index(path).values()))]
    return [path / name for name in (f"model{SUFFIX}", PTH) if (path / name).is_file()][:1]


def open_weights(path: Path, trust_pickle: bool) -> Source:
    files = weight_files(path)
    if is_pickled(files[0]):
        return _open_pth(path, files[0], trust_pickle)
    chunks: dict[str, Chunk] = {}
    shapes: dict[str, torch.Size] = {}
    for file in files:
        for name, (chunk, shape) in _safetensors(file).items():
            if name in chunks:
                raise DataError(f"{file} and {chunks[name].path} both hold {name}")
            chunks[name], shapes[name] = chunk, shape
    _check_index(path, set(shapes))
    ours = our_names(shapes)
    shapes = {f"model/{ours[name]}": shape for name, shape in shapes.items() if name in ours}
    reader = ChunkReader({f"model/{ours[name]}": [chunk] for name, chunk in chunks.items() if name in ours}, full_spans(shapes))
    return Source(path, f"safetensors, {len(files)} files", shapes, reader, reader.files)


def _open_pth(path: Path, file: Path, trust_pickle: bool) -> Source:
    read = read_pickled(file, trust_pickle)
    tensors = named_states(file, read.value)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    if read.whole:
        return Source(path, ".pth in torch.save's old format, read whole", shapes, InMemory(tensors), [file])
    reader = ChunkReader({key: [read.chunk(tensor)] for key, tensor in tensors.items()}, full_spans(shapes))
    return Source(path, ".pth", shapes, reader, [file])


def named_states(path: Path, value: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of a dict of two (``model``, ``model_ema``), by ``KIND/NAME`` under our names.

    Raises DataError, naming ``path``, if there are none.
    """
    value = value if isinstance(value, dict) else {}
    states = {"model": value["model"], "ema": value.get("model_ema")} if "model" in value else {"model": value}
    tensors: dict[str, Tensor] = {}
    for kind, state in states.items():
        if isinstance(state, dict):
            floats = {name: t for name, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()}
            ours = our_names(floats)
            tensors |= {f"{kind}/{ours[name]}": tensor for name, tensor in floats.items() if name in ours}
    if not any(key.startswith("model/") for key in tensors):
        raise DataError(f"{path} holds no weights")
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            raise DataError(f"{path}: {key} is sparse, or has no values")
        if tensor.dtype not in DTYPES.values():
            raise DataError(f"{path}: {key} is {tensor.dtype}; only float32, bfloat16 and float16 are supported")
    return tensors


def _safetensors(path: Path) -> dict[str, tuple[Chunk, torch.Size]]:
    """Return the location and shape of each floating-point tensor."""
    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        header, offset = read_header(path)
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            shape, begin, end = located(entry)
            if dtype := DTYPES.get(entry["dtype"]):
                elements = math.prod(shape)
                if end - begin != elements * dtype.itemsize:
                    raise ValueError
                found[name] = Chunk(0, elements, path, offset + begin, dtype), torch.Size(shape)
            elif entry["dtype"].startswith("F"):
                raise DataError(f"{path}: {name} is {entry['dtype']}; only {', '.join(DTYPES)} are supported")
        return found
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is torn, or not a safetensors file") from None


def _index(folder: Path) -> dict[str, str]:
    """Return the name of each tensor's file, which is in the same folder."""
    try:
        files: dict[str, str] = parse_json((folder / INDEX).read_bytes())["weight_map"]
        elsewhere = [name for name in files.values() if not is_entry_name(name)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{folder / INDEX} is not an index of safetensors files") from None
    if elsewhere:
        raise DataError(f"{folder / INDEX} names {elsewhere[0]!r}, which is not a file in its folder")
    return files


def _check_index(path: Path, names: set[str]) -> None:
    if (path / INDEX).is_file() and (lacking := set(_index(path)) - names):
        raise DataError(f"{path / INDEX} lists {len(lacking)} tensors that its files lack, first {min(lacking)}")
