"""Read one sample of a data set at any position. Every byte is checked before it is used."""

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from xar_scale.data.faults import Fault
from xar_scale.data.index import Index, Spans
from xar_scale.data.shards import (
    DATASET_FILE,
    FORMAT,
    INDEX,
    MAX_ARRAY_BYTES,
    DatasetInfo,
    Sample,
    ShardInfo,
    npy_header,
)
from xar_scale.data.storage import FileSpec, LocalFolder, MissingFileError, Storage
from xar_scale.errors import DataError
from xar_scale.files import parse_json
from xar_scale.validation import validated


class ShardError(DataError):
    """A shard cannot be opened, so none of its samples can be read."""


class LatentShards:
    """A set opened for reading. Every byte is checked against the index. Shards and indexes open when first needed."""

    open_shards = 64  # shards and parsed indexes kept open per process; a reader that cycles through more sets it higher

    def __init__(self, where: str | Path | Storage) -> None:
        """Raises DataError, naming the file, if there is no complete set."""
        self.storage = LocalFolder(Path(where)) if isinstance(where, str | Path) else where
        if isinstance(self.storage, LocalFolder) and not self.storage.folder.is_dir():
            raise DataError(f"no data folder at {self.storage.folder}")
        self.remote = not isinstance(self.storage, LocalFolder)
        path = self.storage.path(DATASET_FILE)
        try:
            values = _json(self.storage.read(DATASET_FILE), path)
        except MissingFileError as error:
            raise DataError(f"{error}: not a data set, or an incomplete one") from None
        if (version := values.pop("format", None)) != FORMAT:
            again = "; index its tars again with tools/index_shards.py" if version == 1 else ""
            raise DataError(f"{path} has format {version}, this version reads {FORMAT}{again}")
        self.info = validated(DatasetInfo, values, DataError, where=f"{path}: ")
        if not self.info.samples:
            raise DataError(f"{path} lists no samples")
        if self.info.array_bytes > MAX_ARRAY_BYTES:
            says = f"shape = {list(self.info.shape)}: {self.info.array_bytes:,} bytes, at most {MAX_ARRAY_BYTES:,} are read"
            raise DataError(f"{path}: {says}")
        seen = set[str]()
        for shard in self.info.shards:
            if "/" in shard.name or not shard.name.isprintable():
                raise DataError(f"{path}: shard {shard.name!r} is in another folder, or not a file name")
            if shard.name in seen:
                raise DataError(f"{path}: shard {shard.name!r} is listed twice")
            seen.add(shard.name)
        self._npy_header = npy_header(self.info)

    def faults(self) -> Iterator[Fault]:
        """Yield a fault for each shard of a local set that is missing or of another size, without reading it.

        Shards of a remote set are checked when they arrive.
        """
        if isinstance(self.storage, LocalFolder):
            for shard in self.info.shards:
                try:
                    self.storage.check_size(f"{shard.name}.tar", shard.bytes)
                except DataError as error:
                    yield Fault(shard.name, 0, error)

    def path(self, shard: int) -> str:
        return self.storage.path(f"{self.info.shards[shard].name}.tar")

    def index(self, shard: int) -> Index:
        """Return a shard's index. Raises DataError if the index or the tar is missing, or not as written."""
        self._open(shard)
        return _read_index(self.storage, self.info, self.info.shards[shard])

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to fetch shards that will be read soon."""
        files = list[FileSpec]()
        for info in (self.info.shards[shard] for shard in shards):
            files += (f"{info.name}.tar", info.bytes, info.crc32), (f"{info.name}{INDEX}", None, info.index_crc32)
        self.storage.prefetch(files)

    def _open(self, shard: int) -> "_OpenShard":
        if not hasattr(self, "_opened"):  # created on first use: it cannot be pickled
            self._opened = lru_cache(maxsize=self.open_shards)(partial(_OpenShard, self.storage, self.info))
            self._broken = dict[int, str]()  # shards that cannot be opened: not tried again for each of their samples
        if shard in self._broken:
            raise ShardError(self._broken[shard])
        try:
            return self._opened(self.info.shards[shard])
        except DataError as error:
            self._broken[shard] = str(error)
            raise ShardError(str(error)) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_opened", "_broken")}

    def read(self, shard: int, position: int) -> Sample:
        """Return sample ``position`` of shard ``shard``. Raises DataError, naming both, if its bytes are not as written."""
        key, label, latent = self.read_array(shard, position, flipped=False)
        flipped = self.read_array(shard, position, flipped=True)[2] if self.info.flipped else None
        return Sample(key, label, latent, flipped)

    def read_array(self, shard: int, position: int, *, flipped: bool) -> tuple[str, int, np.ndarray]:
        """Return key, label and one array of a sample (plain or mirrored), with a single read. The array is read-only."""
        opened = self._open(shard)
        key = opened.keys[position]
        begin, data, size, crc32 = (opened.flipped if flipped else opened.latent)[position].tolist()
        wanted = max(min(data + size, opened.shard.bytes) - begin, 0)  # an index may place a sample beyond its tar
        content = opened.file.pread(wanted, begin)
        found = zlib.crc32(content)
        if found != crc32 and opened.discard():
            content = opened.file.pread(wanted, begin)
            found = zlib.crc32(content)
        if found != crc32:
            raise DataError(f"shard {opened.file.name}, sample {key} (number {position}): checksum does not match")
        # The header must equal the set's, byte for byte. No header is ever interpreted, so no pickle is ever loaded
        data -= begin
        begin = data + len(self._npy_header)
        if content[data:begin] != self._npy_header or size != len(self._npy_header) + self.info.array_bytes:
            name = "the mirrored array" if flipped else "the array"
            raise DataError(f"shard {opened.file.name}, sample {key}: {name} is not {self.info.dtype}{self.info.shape}")
        array = np.frombuffer(content, self.info.dtype, offset=begin).reshape(self.info.shape)
        return key, int(opened.labels[position]), array


class _OpenShard:
    """A shard's file, and what reading needs of its index, as compact arrays: hundreds of shards are open at a time."""

    def __init__(self, storage: Storage, info: DatasetInfo, shard: ShardInfo) -> None:
        self.storage, self.shard = storage, shard
        index = _read_index(storage, info, shard)
        self.keys, self.labels = index.keys, np.array(index.labels)
        self.latent, self.flipped = _rows(index.latent), _rows(index.flipped)
        self.file = storage.open(f"{shard.name}.tar", shard.bytes, shard.crc32)

    def discard(self) -> bool:
        """Return whether the file was a cached copy and has been removed."""
        return self.storage.discard(f"{self.shard.name}.tar", self.shard.crc32)


def _read_index(storage: Storage, info: DatasetInfo, shard: ShardInfo) -> Index:
    name = f"{shard.name}{INDEX}"
    content = storage.read_immutable(name, shard.index_crc32)
    if zlib.crc32(content) != shard.index_crc32:
        raise DataError(f"{storage.path(name)} is torn or changed: its checksum does not match {DATASET_FILE}")
    try:
        index = Index.from_json(content)
        wrong = _wrong(index, info, shard)
    except (KeyError, TypeError, ValueError, OverflowError):  # the last: a number that does not fit 64 bits
        raise DataError(f"{storage.path(name)} is not the index of a shard") from None
    if wrong:
        raise DataError(f"{storage.path(name)} {wrong}")
    return index


def _wrong(index: Index, info: DatasetInfo, shard: ShardInfo) -> str:
    """Return what an index holds that cannot be, or nothing. Its checksum does not tell: whoever wrote it computed that too."""
    if not isinstance(index.keys, list) or set(map(type, index.keys)) != {str}:
        return "has keys that are not text"
    if len(index.keys) != shard.samples:
        return f"holds {len(index.keys)} samples, {DATASET_FILE} says {shard.samples}"
    if (index.flipped != Spans()) != info.flipped:
        return f"{'lacks' if info.flipped else 'holds'} mirrored arrays, {DATASET_FILE} says otherwise"
    arrays = {"latent": index.latent} | ({"flipped": index.flipped} if info.flipped else {})
    spans = {f"{array}.{name}": column for array, columns in arrays.items() for name, column in vars(columns).items()}
    for name, column in {"labels": index.labels, **spans}.items():
        if not isinstance(column, list) or set(map(type, column)) != {int}:  # numpy would round and convert
            return f"has {name} that are not integers"
        if len(column) != shard.samples:
            return f"has {len(column)} {name} for {shard.samples} samples"
    if outside := [at for at, label in enumerate(index.labels) if not 0 <= label < info.classes]:
        return f"gives sample {index.keys[outside[0]]} the label {index.labels[outside[0]]}, outside 0..{info.classes - 1}"
    for columns in arrays.values():
        begin, data, size, _ = _rows(columns).T
        misplaced = (begin < 0) | (data < begin) | (size < 0)
        if misplaced.any():
            return f"places sample {index.keys[misplaced.argmax()]} where no sample can be"
    return ""


def _rows(spans: Spans) -> np.ndarray:
    """Return (begin, data, size, crc32) for each sample."""
    return np.array([spans.begin, spans.data, spans.size, spans.crc32], dtype=np.int64).T


def _json(content: bytes, path: str) -> dict[str, Any]:
    try:
        values = parse_json(content)
    except ValueError:
        raise DataError(f"{path} is not JSON: torn or changed") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a {type(values).__name__}, not an object")
    return values
