"""Latents that others stored: WebDataset tars that get an index beside them, and MAR's folder of .npz files."""

import io
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np

from xar_scale import rng
from xar_scale.data.index import Index, Members, index_tar
from xar_scale.data.shards import INDEX, DatasetInfo, Sample, ShardInfo, begin_set, end_set, npy
from xar_scale.errors import DataError
from xar_scale.files import write_atomically

MAR_LATENT, MAR_FLIPPED = "moments", "moments_flip"  # arrays of a file of MAR's cache


def index_set(
    folder: Path,
    members: Members,
    *,
    tokenizer: dict[str, Any],
    latent_scale: float,
    stored: Literal["latents", "moments"],
    classes: int,
    processes: int,
) -> DatasetInfo:
    """Write an index for every tar in ``folder``, and the set's description. The tars stay as they are.

    Every array must be a .npy of the shape and type that the first one has. Raises DataError naming the shard and sample
    that is not, UsageError where the folder holds a set already.
    """
    begin_set(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"no .tar in {folder}")
    shape, dtype = _first_array(tars[0], members)
    info = DatasetInfo(tokenizer, latent_scale, stored, shape, dtype, classes, members.flipped is not None)
    with ProcessPoolExecutor(processes) as pool:
        shards = tuple(pool.map(partial(_index_shard, members, info), tars))
    end_set(folder, info, shards)
    return replace(info, shards=shards)


def _first_array(path: Path, members: Members) -> tuple[tuple[int, int, int], Literal["float16", "float32"]]:
    with path.open("rb") as file:
        index = index_tar(file, str(path), members)
        if not index.keys:
            raise DataError(f"shard {path} holds no samples")
        file.seek(index.latent.data[0])
        content = io.BytesIO(file.read(index.latent.size[0]))
    try:
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError("its version is not 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
    except ValueError as error:
        raise DataError(f"shard {path}, sample {index.keys[0]}: {members.latent} is no .npy array: {error}") from None
    if fortran or len(shape) != 3 or dtype not in (np.float16, np.float32) or not dtype.isnative:
        raise DataError(f"shard {path}, sample {index.keys[0]}: {members.latent} is {dtype}{shape}, not 3-D float16 or float32")
    return shape, "float16" if dtype == np.float16 else "float32"


def _index_shard(members: Members, info: DatasetInfo, path: Path) -> ShardInfo:
    content = path.read_bytes()
    index = index_tar(io.BytesIO(content), str(path), members)
    _check_arrays(content, index, info, path)
    if wrong := [at for at, label in enumerate(index.labels) if label >= info.classes]:
        at = wrong[0]
        raise DataError(f"shard {path}, sample {index.keys[at]}: label {index.labels[at]} is outside 0..{info.classes - 1}")
    text = index.to_json()
    write_atomically(path.with_name(f"{path.stem}{INDEX}"), text)
    return ShardInfo(path.stem, len(index.keys), len(content), zlib.crc32(content), zlib.crc32(text))


def _check_arrays(content: bytes, index: Index, info: DatasetInfo, path: Path) -> None:
    example = npy(np.zeros(info.shape, info.dtype))
    header = example[: len(example) - np.dtype(info.dtype).itemsize * int(np.prod(info.shape))]
    for spans in (index.latent, index.flipped):
        for key, data, size in zip(index.keys, spans.data, spans.size, strict=False):
            if content[data : data + len(header)] != header or size != len(example):
                raise DataError(f"shard {path}, sample {key}: an array is not {info.dtype}{info.shape}, as the first is")


def mar_samples(root: Path, dtype: Literal["float16", "float32"]) -> Iterator[Sample]:
    """The samples of MAR's cache: a folder a class, in alphabetical order, with a .npz a sample.

    In a fixed random order: as they lie, a shard would be of one class. Raises DataError for what is no such cache.
    """
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    files = [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.glob("*.npz"))]
    if not files:
        raise DataError(f"{root} holds no folders of .npz files")
    for at in rng.generator(0, "import").permutation(len(files)):
        path, label = files[at]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                latent, flipped = (arrays[name].astype(dtype) for name in (MAR_LATENT, MAR_FLIPPED))
        except (OSError, ValueError, KeyError, EOFError, zlib.error, BadZipFile) as error:
            raise DataError(f"{path} is no sample of MAR's cache: {error}") from None
        yield Sample(f"{path.parent.name}-{path.stem.split('.')[0]}", label, latent, flipped)
