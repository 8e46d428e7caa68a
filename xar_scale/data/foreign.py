"""Latents made by other tools: indexing their WebDataset tars, and reading MAR's folder of .npz files."""

import io
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from xar_scale import rng
from xar_scale.data.index import Index, Members, crc32_of, index_tar
from xar_scale.data.processes import map_in_processes
from xar_scale.data.shards import (
    DATASET_FILE,
    INDEX,
    MAX_ARRAY_BYTES,
    DatasetInfo,
    Sample,
    ShardInfo,
    create_set_folder,
    npy_header,
    write_dataset_file,
)
from xar_scale.errors import DataError, UsageError
from xar_scale.files import write_atomically
from xar_scale.tokenizers import check_origin

MAR_LATENT, MAR_FLIPPED = "moments", "moments_flip"  # arrays in a file of MAR's cache


def index_set(
    folder: Path,
    members: Members,
    *,
    flipped: bool,
    tokenizer: dict[str, Any],
    latent_scale: float,
    stored: Literal["latents", "moments"],
    classes: int,
    processes: int,
) -> DatasetInfo:
    """Write an index for every tar in ``folder``, and the set's description. The tars are not changed.

    Every array must be a .npy with the shape and type of the first one. Raises DataError naming the shard and sample if one
    is not; what ``check_origin`` raises; UsageError if the folder already holds a set.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder at {folder}")
    create_set_folder(folder, f"to index its tars again, remove {DATASET_FILE} and *{INDEX}")  # the tars are the user's
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"no .tar in {folder}")
    shape, dtype = _first_array(tars[0], members, flipped)
    check_origin(tokenizer, stored, shape[0])
    info = DatasetInfo(tokenizer, latent_scale, stored, shape, dtype, classes, flipped, members)
    shards = tuple(map_in_processes(partial(_index_shard, info), tars, processes))
    write_dataset_file(folder, info, shards)
    return replace(info, shards=shards)


def _first_array(path: Path, members: Members, flipped: bool) -> tuple[tuple[int, int, int], Literal["float16", "float32"]]:
    with path.open("rb") as file:
        index = index_tar(file, str(path), members, flipped)
        if not index.keys:
            raise DataError(f"shard {path} holds no samples")
        file.seek(index.latent.data[0])
        content = io.BytesIO(file.read(size := index.latent.size[0]))
    try:
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError("its version is not 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
    except Exception as error:  # numpy's parser raises any of a dozen types
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"shard {path}, sample {index.keys[0]}: {members.latent} is not a .npy array: {why}") from None
    if fortran or len(shape) != 3 or min(shape) < 1 or dtype not in (np.float16, np.float32) or not dtype.isnative:
        raise DataError(f"shard {path}, sample {index.keys[0]}: {members.latent} is {dtype}{shape}, not 3-D float16 or float32")
    if (wanted := math.prod(shape) * dtype.itemsize) != size - content.tell() or wanted > MAX_ARRAY_BYTES:
        says = f"its header says {wanted:,} bytes, it has {size - content.tell():,}; at most {MAX_ARRAY_BYTES:,} are read"
        raise DataError(f"shard {path}, sample {index.keys[0]}: {members.latent} is not a .npy array: {says}")
    channels, rows, columns = map(int, shape)  # True is 1 too
    return (channels, rows, columns), "float16" if dtype == np.float16 else "float32"


def _index_shard(info: DatasetInfo, path: Path) -> ShardInfo:
    with path.open("rb") as file:
        index = index_tar(file, str(path), info.members, info.flipped)
        if not index.keys:
            raise DataError(f"shard {path} holds no samples")
        _check_arrays(file, index, info, path)
        size, crc32 = file.seek(0, os.SEEK_END), crc32_of(file)
    if wrong := [at for at, label in enumerate(index.labels) if label >= info.classes]:
        at = wrong[0]
        raise DataError(f"shard {path}, sample {index.keys[at]}: label {index.labels[at]} is outside 0..{info.classes - 1}")
    text = index.to_json()
    write_atomically(path.with_name(f"{path.stem}{INDEX}"), text)
    return ShardInfo(path.stem, len(index.keys), size, crc32, zlib.crc32(text))


def _check_arrays(file: BinaryIO, index: Index, info: DatasetInfo, path: Path) -> None:
    header = npy_header(info)
    whole = len(header) + info.array_bytes
    for spans in (index.latent, index.flipped):
        for key, data, size in zip(index.keys, spans.data, spans.size, strict=False):
            file.seek(data)
            content = file.read(size)
            if content[: len(header)] != header or size != whole:
                raise DataError(f"shard {path}, sample {key}: an array is not {info.dtype}{info.shape} like the first")
            if not np.isfinite(np.frombuffer(content, info.dtype, offset=len(header))).all():
                raise DataError(f"shard {path}, sample {key}: an array is not finite")


def mar_samples(root: Path, dtype: Literal["float16", "float32"]) -> Iterator[Sample]:
    """Yield the samples of MAR's cache: one folder per class, in alphabetical order, with one .npz per sample.

    The order is random but fixed: in storage order, a shard would hold one class. Raises DataError if it is not such a cache.
    """
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    files = [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.glob("*.npz"))]
    if not files:
        raise DataError(f"{root} contains no folders of .npz files")
    if empty := [folder for folder in classes if not any(folder.glob("*.npz"))]:
        raise DataError(f"{empty[0]} contains no .npz, so it is not a class: the labels after it would shift")
    if nested := [folder for folder in root.glob("*/*") if folder.is_dir()]:
        raise DataError(f"{nested[0]} is nested deeper than MAR's cache")
    for at in rng.generator(0, "import").permutation(len(files)):
        path, label = files[at]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if (largest := max(member.file_size for member in arrays.zip.infolist())) > MAX_ARRAY_BYTES:
                    raise ValueError(f"an array has {largest:,} bytes, over {MAX_ARRAY_BYTES:,}")
                latent, flipped = (arrays[name] for name in (MAR_LATENT, MAR_FLIPPED))
        except Exception as error:  # torn bytes raise any of a dozen types; a header of a huge shape, MemoryError
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{path} is not a sample of MAR's cache: {why}") from None
        with np.errstate(over="ignore"):  # checked next
            latent, flipped = latent.astype(dtype), flipped.astype(dtype)
        if latent.ndim != 3 or not (np.isfinite(latent).all() and np.isfinite(flipped).all()):
            raise DataError(f"{path}: its moments {latent.shape} are not 3-D, or not finite in {dtype}")
        key = path.name.removesuffix(".npz").removesuffix(".JPEG").replace(".", "_")
        yield Sample(f"{path.parent.name}-{key}", label, latent, flipped)
