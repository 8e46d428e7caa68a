"""WebDataset tars of latents with an index beside them: writing, opening, reading one sample at any position.

A set is a folder: ``dataset.json`` (what all samples share, and the list of shards), and for each shard ``NAME.tar`` and
``NAME.index.json`` (keys, positions, a checksum a sample). The tars are plain WebDataset: stock readers need no index.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from xar_scale.config import STRICT, validated
from xar_scale.errors import DataError, UsageError
from xar_scale.files import write_atomically

FORMAT = 1
MAX_KEY = 80  # characters: with a member's ending it must fit the 100 of a tar header
DATASET_FILE = "dataset.json"
LATENT, FLIPPED, LABEL = "latent.npy", "flipped.npy", "cls"  # members of a sample


@dataclass(frozen=True, config=STRICT)
class ShardInfo:
    name: str
    samples: PositiveInt
    bytes: PositiveInt
    index_crc32: int  # of the index file: what it says is as good as what it describes


@dataclass(frozen=True, config=STRICT)
class DatasetInfo:
    """What all samples of a set share. ``stored`` says what an array is: latents, or a posterior's mean and log variance."""

    tokenizer: dict[str, Any]  # name and settings
    latent_scale: float
    stored: Literal["latents", "moments"]
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # of a stored array: channels, rows, columns
    dtype: Literal["float16", "float32"]
    classes: PositiveInt
    flipped: bool  # a second array of the mirrored image
    shards: tuple[ShardInfo, ...] = ()

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the description: the same for a copy elsewhere, another for anything that moves or changes a sample."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

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


class ShardWriter:
    """Writes samples to shards of ``samples_per_shard`` in the order given; the same samples give the same bytes.

    A context manager: ``dataset.json`` is written on a clean exit, so a set that has one is whole. Raises UsageError when
    the folder already holds one.
    """

    def __init__(
        self, folder: str | Path, info: DatasetInfo, *, prefix: str = "latents", samples_per_shard: int = 1024
    ) -> None:
        self.folder, self.info, self.prefix, self.samples_per_shard = Path(folder), info, prefix, samples_per_shard
        if samples_per_shard < 1:
            raise UsageError(f"a shard has at least 1 sample, not {samples_per_shard}")
        if (self.folder / DATASET_FILE).exists():
            raise UsageError(f"{self.folder} already holds a data set; remove it or write elsewhere")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write a data set to {self.folder}: {error.strerror}") from None
        self.shards: list[ShardInfo] = []
        self._samples: list[tuple[str, list[tuple[str, bytes]]]] = []

    def add(self, key: str, label: int, latent: np.ndarray, flipped: np.ndarray | None = None) -> None:
        if not key or len(key) > MAX_KEY or "." in key or "/" in key:
            raise DataError(
                f"sample key {key!r}: 1 to {MAX_KEY} characters without dots, where WebDataset ends a key, and slashes"
            )
        if any(key == before for before, _ in self._samples):
            raise DataError(f"sample key {key!r} comes twice in one shard: WebDataset would merge the two")
        if not 0 <= label < self.info.classes:
            raise DataError(f"sample {key}: label {label} is outside 0..{self.info.classes - 1}")
        if (flipped is not None) != self.info.flipped:
            raise DataError(f"sample {key}: mirrored array {'missing' if self.info.flipped else 'unexpected'} in this set")
        members = [(LABEL, str(label).encode())]
        for name, array in ((LATENT, latent), (FLIPPED, flipped)):
            if array is not None:
                if array.shape != self.info.shape or array.dtype != self.info.dtype:
                    raise DataError(
                        f"sample {key}: {name} is {array.dtype}{array.shape}, the set is {self.info.dtype}{self.info.shape}"
                    )
                members.append((name, _npy(np.ascontiguousarray(array))))
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
        index_content = json.dumps(index).encode()
        write_atomically(self.folder / f"{name}.index.json", index_content)
        self.shards.append(ShardInfo(name, len(self._samples), len(content), zlib.crc32(index_content)))
        self._samples = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        self._flush()
        description = {"format": FORMAT, **asdict(self.info), "shards": [asdict(shard) for shard in self.shards]}
        write_atomically(self.folder / DATASET_FILE, json.dumps(description, indent=1).encode())


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
        if (version := values.pop("format", None)) != FORMAT:
            raise DataError(f"{path} is of format {version}, this version reads {FORMAT}")
        self.info = validated(DatasetInfo, values, DataError, where=f"{path}: ")
        if not self.info.samples:
            raise DataError(f"{path} lists no samples")
        self._npy_header = _npy(np.zeros(self.info.shape, self.info.dtype))[: -self._array_bytes]

    @property
    def _array_bytes(self) -> int:
        return int(np.prod(self.info.shape)) * np.dtype(self.info.dtype).itemsize

    def check_sizes(self) -> None:
        """Compare every shard's size with the index. Raises DataError for the first that is missing, truncated or grown."""
        for shard in self.info.shards:
            _check_size(self.folder, shard)

    def _open(self, shard: int) -> "_OpenShard":
        if not hasattr(self, "_opened"):  # made on first use, so that a worker process has its own
            self._opened = lru_cache(maxsize=self.OPEN_SHARDS)(partial(_OpenShard, self.folder))
        return self._opened(self.info.shards[shard])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def read(self, shard: int, position: int) -> Sample:
        """Sample ``position`` of shard ``shard``. Raises DataError naming both when its bytes are not as written."""
        opened = self._open(shard)
        key, (begin, size) = opened.keys[position], opened.spans[position]
        try:
            span = os.pread(opened.descriptor, int(size), int(begin))
        except OSError as error:
            raise DataError(f"shard {opened.path}, sample {key}: {error.strerror}") from None
        if zlib.crc32(span) != opened.crc32[position]:
            raise DataError(f"shard {opened.path}, sample {key} (number {position}): checksum does not match")

        def member(name: str) -> bytes:
            offset, length = opened.members[name][position]
            return span[offset - begin : offset - begin + length]

        def array(name: str) -> np.ndarray:
            """A view of the stored array. Its header must be the set's, byte for byte: no header is ever interpreted."""
            content, header = member(name), len(self._npy_header)
            if content[:header] != self._npy_header or len(content) != header + self._array_bytes:
                raise DataError(f"shard {opened.path}, sample {key}: {name} is not {self.info.dtype}{self.info.shape}")
            return np.frombuffer(content, self.info.dtype, offset=header).reshape(self.info.shape)

        return Sample(key, int(member(LABEL)), array(LATENT), array(FLIPPED) if self.info.flipped else None)


class _OpenShard:
    """A shard's file and index; closed when the cache lets go of it."""

    def __init__(self, folder: Path, shard: ShardInfo) -> None:
        index_path = folder / f"{shard.name}.index.json"
        if zlib.crc32(_read(index_path)) != shard.index_crc32:
            raise DataError(f"{index_path} is torn or changed: its checksum is not the one in {DATASET_FILE}")
        index = _read_json(index_path)
        self.keys: list[str] = index["keys"]
        self.spans = np.array([index["offset"], index["size"]], dtype=np.int64).T
        self.crc32 = np.array(index["crc32"], dtype=np.uint32)
        self.members = {
            name: np.array([where["offset"], where["size"]], dtype=np.int64).T for name, where in index["members"].items()
        }
        self.path = _check_size(folder, shard)
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {self.path}: {error.strerror}") from None

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


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
