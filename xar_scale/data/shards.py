"""WebDataset tars of latents with an index beside them: writing, opening, reading one sample at any position.

A set is a folder: ``dataset.json`` (what all samples share, and the list of shards), and for each shard ``NAME.tar`` and
``NAME.index.json`` (keys, positions, a checksum a sample). The tars are plain WebDataset: stock readers need no index.
"""

import io
import json
import os
import tarfile
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import Self

from xar_scale.errors import DataError, UsageError

FORMAT = 1
DATASET_FILE = "dataset.json"
LATENT, FLIPPED, LABEL = "latent.npy", "flipped.npy", "cls"  # members of a sample


@dataclass(frozen=True)
class ShardInfo:
    name: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class DatasetInfo:
    """What all samples of a set share. ``stored`` says what an array is: latents, or a posterior's mean and log variance."""

    tokenizer: dict[str, Any]  # name and settings
    latent_scale: float
    stored: str  # "latents" | "moments"
    shape: tuple[int, ...]  # of a stored array
    dtype: str
    classes: int
    flipped: bool  # a second array of the mirrored image
    shards: tuple[ShardInfo, ...] = ()

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, rows, columns = self.shape
        return (channels // 2 if self.stored == "moments" else channels), rows, columns


class Sample(NamedTuple):
    """One stored sample; ``flipped`` is None where the set has no mirrored arrays."""

    key: str
    label: int
    latent: np.ndarray
    flipped: np.ndarray | None


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Either the old file or the whole new one is there at any moment, also after a crash."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class ShardWriter:
    """Writes samples to shards of ``samples_per_shard`` in the order given; the same samples give the same bytes.

    A context manager: ``dataset.json`` is written on a clean exit, so a set that has one is whole. Raises UsageError when
    the folder already holds one.
    """

    def __init__(
        self, folder: str | Path, info: DatasetInfo, *, prefix: str = "latents", samples_per_shard: int = 1024
    ) -> None:
        self.folder, self.info, self.prefix, self.samples_per_shard = Path(folder), info, prefix, samples_per_shard
        if (self.folder / DATASET_FILE).exists():
            raise UsageError(f"{self.folder} already holds a data set; remove it or write elsewhere")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: list[ShardInfo] = []
        self._samples: list[tuple[str, list[tuple[str, bytes]]]] = []

    def add(self, key: str, label: int, latent: np.ndarray, flipped: np.ndarray | None = None) -> None:
        if "." in key or "/" in key:
            raise UsageError(f"sample key {key!r}: WebDataset ends a key at the first dot, and folders are not kept")
        if not 0 <= label < self.info.classes:
            raise DataError(f"sample {key}: label {label} is outside 0..{self.info.classes - 1}")
        members = [(LABEL, str(label).encode())]
        for name, array in ((LATENT, latent), (FLIPPED, flipped)):
            if array is not None:
                if array.shape != self.info.shape or array.dtype != self.info.dtype:
                    raise DataError(
                        f"sample {key}: {name} is {array.dtype}{array.shape}, the set is {self.info.dtype}{self.info.shape}"
                    )
                members.append((name, _npy(array)))
        self._samples.append((key, members))
        if len(self._samples) == self.samples_per_shard:
            self._flush()

    def _flush(self) -> None:
        if not self._samples:
            return
        name = f"{self.prefix}-{len(self.shards):06d}"
        tar_bytes = io.BytesIO()
        index: dict[str, Any] = {"keys": [], "offset": [], "size": [], "crc32": [], "members": {}}
        with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in self._samples:
                begin = tar_bytes.tell()
                for member, content in members:
                    header = tarfile.TarInfo(f"{key}.{member}")
                    header.size = len(content)
                    positions = index["members"].setdefault(member, {"offset": [], "size": []})
                    positions["offset"].append(tar_bytes.tell() + tarfile.BLOCKSIZE)
                    positions["size"].append(len(content))
                    tar.addfile(header, io.BytesIO(content))
                end = tar_bytes.tell()
                index["keys"].append(key)
                index["offset"].append(begin)
                index["size"].append(end - begin)
                index["crc32"].append(zlib.crc32(tar_bytes.getbuffer()[begin:end]))
        content = tar_bytes.getvalue()
        write_atomically(self.folder / f"{name}.tar", content)
        write_atomically(self.folder / f"{name}.index.json", json.dumps(index).encode())
        self.shards.append(ShardInfo(name, len(self._samples), len(content)))
        self._samples = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        self._flush()
        description = {"format": FORMAT, **asdict(self.info), "shards": [asdict(shard) for shard in self.shards]}
        write_atomically(self.folder / DATASET_FILE, json.dumps(description, indent=1).encode())


class _ShardIndex:
    """Positions and checksums of one shard's samples."""

    def __init__(self, path: Path, samples: int) -> None:
        values = _read_json(path)
        try:
            self.keys: list[str] = values["keys"]
            self.spans = np.array([values["offset"], values["size"]], dtype=np.int64).T
            self.crc32 = np.array(values["crc32"], dtype=np.uint32)
            self.members = {
                name: np.array([where["offset"], where["size"]], dtype=np.int64).T for name, where in values["members"].items()
            }
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path} is no shard index") from None
        if not len(self.keys) == len(self.spans) == len(self.crc32) == samples:
            raise DataError(f"{path} lists {len(self.keys)} samples, {DATASET_FILE} says {samples}")


class LatentShards:
    """A set opened for reading. Every byte read is checked against the index; shards and indexes open when first needed."""

    OPEN_SHARDS = 64  # open files and parsed indexes kept a process

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError, naming the file, when the folder holds no whole set."""
        self.folder = Path(folder)
        path = self.folder / DATASET_FILE
        if not self.folder.is_dir():
            raise DataError(f"no data folder at {self.folder}")
        if not path.exists():
            raise DataError(f"{self.folder} holds no {DATASET_FILE}: not a data set, or one not written to its end")
        values = _read_json(path)
        if values.get("format") != FORMAT:
            raise DataError(f"{path} is of format {values.get('format')}, this version reads {FORMAT}")
        try:
            shards = tuple(ShardInfo(**shard) for shard in values.pop("shards"))
            del values["format"]
            self.info = DatasetInfo(**{**values, "shape": tuple(values["shape"]), "shards": shards})
        except (KeyError, TypeError):
            raise DataError(f"{path} lacks fields or has unknown ones") from None
        if not self.info.samples:
            raise DataError(f"{path} lists no samples")
        self._npy_header = _npy(np.zeros(self.info.shape, self.info.dtype))[: -self._array_bytes]

    @property
    def _array_bytes(self) -> int:
        return int(np.prod(self.info.shape)) * np.dtype(self.info.dtype).itemsize

    def check_sizes(self) -> None:
        """Compare every shard's size with the index. Raises DataError for the first that is missing, truncated or grown."""
        for shard in self.info.shards:
            self._check_size(shard)

    def _check_size(self, shard: ShardInfo) -> Path:
        path = self.folder / f"{shard.name}.tar"
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"shard {path} is missing") from None
        if size != shard.bytes:
            what = "truncated" if size < shard.bytes else "changed"
            raise DataError(f"shard {path} is {what}: {size} bytes, the index says {shard.bytes}")
        return path

    def _open(self, shard: int) -> tuple[int, _ShardIndex]:
        if not hasattr(self, "_opened"):  # made on first use, so that a worker process has its own
            self._opened = lru_cache(maxsize=self.OPEN_SHARDS)(_OpenShard)
        opened = self._opened(self, shard)
        return opened.descriptor, opened.index

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def read(self, shard: int, position: int) -> Sample:
        """Sample ``position`` of shard ``shard``. Raises DataError naming both when its bytes are not as written."""
        descriptor, index = self._open(shard)
        key, (begin, size) = index.keys[position], index.spans[position]
        span = os.pread(descriptor, int(size), int(begin))
        if zlib.crc32(span) != index.crc32[position]:
            name = self.info.shards[shard].name
            raise DataError(f"shard {self.folder / name}.tar, sample {key} (number {position}): checksum does not match")

        def member(name: str) -> bytes:
            offset, length = index.members[name][position]
            return span[offset - begin : offset - begin + length]

        flipped = self._array(member(FLIPPED), shard, key) if self.info.flipped else None
        return Sample(key, int(member(LABEL)), self._array(member(LATENT), shard, key), flipped)

    def _array(self, content: bytes, shard: int, key: str) -> np.ndarray:
        """A view of the stored array. Its header must be the set's, byte for byte: no header is ever interpreted."""
        header = len(self._npy_header)
        if content[:header] != self._npy_header or len(content) != header + self._array_bytes:
            name = self.info.shards[shard].name
            raise DataError(f"shard {self.folder / name}.tar, sample {key}: array is not {self.info.dtype}{self.info.shape}")
        return np.frombuffer(content, self.info.dtype, offset=header).reshape(self.info.shape)


class _OpenShard:
    """A shard's file and index; closed when the cache lets go of it."""

    def __init__(self, shards: LatentShards, shard: int) -> None:
        info = shards.info.shards[shard]
        self.index = _ShardIndex(shards.folder / f"{info.name}.index.json", info.samples)
        self.descriptor = os.open(shards._check_size(info), os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except ValueError:
        raise DataError(f"{path} is not JSON: torn or changed") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a {type(values).__name__}, not an object")
    return values
