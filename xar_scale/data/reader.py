"""Reading one sample of a data set at any position; every byte that is used has been checked."""

import json
import os
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from xar_scale.config import validated
from xar_scale.data.index import Index, Spans
from xar_scale.data.shards import DATASET_FILE, FORMAT, INDEX, DatasetInfo, Sample, ShardInfo, npy_header
from xar_scale.errors import DataError


class LatentShards:
    """A set opened for reading. Every byte read is checked against the index; shards and indexes open when first needed."""

    open_shards = 64  # open files and parsed indexes kept a process; a reader that goes around more sets it higher

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError, naming the file, when the folder holds no whole set."""
        self.folder = Path(folder)
        path = self.folder / DATASET_FILE
        if not self.folder.is_dir():
            raise DataError(f"no data folder at {self.folder}")
        if not path.exists():
            raise DataError(f"{self.folder} holds no {DATASET_FILE}: not a data set, or one not written to its end")
        values = _read_json(path)
        if (version := values.pop("format", None)) != FORMAT:
            again = "; its tars can be indexed again (tools/index_shards.py)" if version == 1 else ""
            raise DataError(f"{path} is of format {version}, this version reads {FORMAT}{again}")
        self.info = validated(DatasetInfo, values, DataError, where=f"{path}: ")
        if not self.info.samples:
            raise DataError(f"{path} lists no samples")
        seen = set[str]()
        for shard in self.info.shards:
            if "/" in shard.name or shard.name in seen:
                raise DataError(
                    f"{path}: shard {shard.name!r} {'comes twice' if shard.name in seen else 'is in another folder'}"
                )
            seen.add(shard.name)
        self._array_bytes = int(np.prod(self.info.shape)) * np.dtype(self.info.dtype).itemsize
        self._npy_header = npy_header(self.info)

    def check_sizes(self) -> None:
        """Compare every shard's size with the index. Raises DataError for the first that is missing, truncated or grown."""
        for shard in self.info.shards:
            _check_size(self.folder, shard)

    def path(self, shard: int) -> Path:
        return self.folder / f"{self.info.shards[shard].name}.tar"

    def index(self, shard: int) -> Index:
        """Raises DataError where the index or the tar is missing, or not as written."""
        return self._open(shard).index

    def _open(self, shard: int) -> "_OpenShard":
        if not hasattr(self, "_opened"):  # made on first use: it cannot be sent to another process
            self._opened = lru_cache(maxsize=self.open_shards)(partial(_OpenShard, self.folder))
        return self._opened(self.info.shards[shard])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def read(self, shard: int, position: int) -> Sample:
        """Sample ``position`` of shard ``shard``. Raises DataError naming both when its bytes are not as written."""
        key, label, latent = self.read_array(shard, position, flipped=False)
        flipped = self.read_array(shard, position, flipped=True)[2] if self.info.flipped else None
        return Sample(key, label, latent, flipped)

    def read_array(self, shard: int, position: int, *, flipped: bool) -> tuple[str, int, np.ndarray]:
        """Key, label and one array of a sample, or its mirrored one: a single read. The array cannot be written to."""
        opened = self._open(shard)
        key, spans = opened.index.keys[position], opened.flipped if flipped else opened.latent
        begin, data, size, crc32 = spans[position]
        try:
            content = os.pread(opened.descriptor, data + size - begin, begin)
        except OSError as error:
            raise DataError(f"shard {opened.path}, sample {key}: {error.strerror}") from None
        if zlib.crc32(content) != crc32:
            raise DataError(f"shard {opened.path}, sample {key} (number {position}): checksum does not match")
        # Its header must be the set's, byte for byte: no header is ever interpreted, so no pickle is ever loaded
        data -= begin
        begin = data + len(self._npy_header)
        if content[data:begin] != self._npy_header or size != len(self._npy_header) + self._array_bytes:
            name = "the mirrored array" if flipped else "the array"
            raise DataError(f"shard {opened.path}, sample {key}: {name} is not {self.info.dtype}{self.info.shape}")
        array = np.frombuffer(content, self.info.dtype, offset=begin).reshape(self.info.shape)
        return key, opened.index.labels[position], array


class _OpenShard:
    """A shard's file and index; closed when the cache lets go of it."""

    def __init__(self, folder: Path, shard: ShardInfo) -> None:
        index_path = folder / f"{shard.name}{INDEX}"
        content = _read(index_path)
        if zlib.crc32(content) != shard.index_crc32:
            raise DataError(f"{index_path} is torn or changed: its checksum is not the one in {DATASET_FILE}")
        self.index = Index.from_json(content)
        if len(self.index.keys) != shard.samples:
            raise DataError(f"{index_path} holds {len(self.index.keys)} samples, {DATASET_FILE} says {shard.samples}")
        self.latent, self.flipped = _rows(self.index.latent), _rows(self.index.flipped)
        self.path = _check_size(folder, shard)
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {self.path}: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _rows(spans: Spans) -> list[tuple[int, int, int, int]]:
    return list(zip(spans.begin, spans.data, spans.size, spans.crc32, strict=True))


def _check_size(folder: Path, shard: ShardInfo) -> Path:
    path = folder / f"{shard.name}.tar"
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing") from None
    except OSError as error:
        raise DataError(f"shard {path}: {error.strerror}") from None
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "changed"
        raise DataError(f"shard {path} is {what}: {size} bytes, the index says {shard.bytes}")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read(path))
    except ValueError:
        raise DataError(f"{path} is not JSON: torn or changed") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a {type(values).__name__}, not an object")
    return values
