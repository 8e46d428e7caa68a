"""Data sets of latents: their description, and writing their shards.

A set is a folder: ``dataset.json`` (what all samples share, and the list of shards), and for each shard ``NAME.tar`` and
``NAME.index.json`` (see index.py). The tars are plain WebDataset: stock readers need no index.
"""

import hashlib
import io
import json
import math
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from xar_scale.data.index import Members, index_tar
from xar_scale.errors import DataError, UsageError
from xar_scale.files import make_folder, write_atomically
from xar_scale.tokenizers import check_origin
from xar_scale.validation import STRICT

FORMAT = 2
MAX_KEY = 80  # characters: with a member's ending it must fit the 100 of a tar header
DATASET_FILE, INDEX = "dataset.json", ".index.json"  # INDEX is a suffix of a shard's name
MAX_ARRAY_BYTES = 1 << 30  # of one stored array: only a mistake exceeds it, and every read would allocate it
ENCODING = ".encoding"  # folder in a set that data/encode.py has not completed yet

Count = Annotated[int, Field(gt=0, lt=1 << 48)]  # sums of counts fit an integer of 64 bits


@dataclass(frozen=True, config=STRICT)
class ShardInfo:
    name: str
    samples: Count
    bytes: Count
    crc32: int  # of the tar
    index_crc32: int  # of the index file, which must be as reliable as the tar


@dataclass(frozen=True, config=STRICT)
class DatasetInfo:
    """What all samples of a set share. ``stored`` is what an array holds: latents, or a posterior's mean and log variance."""

    tokenizer: dict[str, Any]  # name and settings
    latent_scale: float
    stored: Literal["latents", "moments"]
    shape: tuple[Count, Count, Count]  # of a stored array: channels, rows, columns
    dtype: Literal["float16", "float32"]
    classes: Count
    flipped: bool  # a second array of the mirrored image
    members: Members = Members()  # names of a sample's files in the tars
    shards: tuple[ShardInfo, ...] = ()
    images: dict[str, Any] = field(default_factory=dict)  # how cache_latents prepared the images, if it did (encode.py)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @cached_property  # read for each sample
    def array_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def max_shards_spanned(self, samples: int) -> int:
        """Return the most shards that ``samples`` consecutive samples can span, for any order of the shards."""
        together = np.cumsum(np.sort([shard.samples for shard in self.shards]))
        within = int(np.searchsorted(together, samples - 2, side="right"))  # the first and the last are in two others
        return min(within + 2, samples, len(self.shards))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that locates samples: the same for a copy, another if any sample moves or changes."""
        values = {name: value for name, value in asdict(self).items() if name != "images"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, rows, columns = self.shape
        return (channels // 2 if self.stored == "moments" else channels), rows, columns


def npy(array: np.ndarray) -> bytes:
    """Return the array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def npy_header(info: DatasetInfo) -> bytes:
    """Return the .npy header that every stored array of a set starts with; its values follow."""
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(np.dtype(info.dtype)), "fortran_order": False, "shape": info.shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


class Sample(NamedTuple):
    """One stored sample; ``flipped`` is None if the set has no mirrored arrays."""

    key: str
    label: int
    latent: np.ndarray
    flipped: np.ndarray | None


class ShardBuilder:
    """A shard being built in memory. The same samples give the same bytes."""

    def __init__(self, info: DatasetInfo) -> None:
        self.info = info
        self._samples: dict[str, list[tuple[str, bytes]]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, key: str, label: int, latent: np.ndarray, flipped: np.ndarray | None = None) -> None:
        """Add a sample. Raises DataError, naming it, if it does not fit the set."""
        if not key or len(key) > MAX_KEY or "." in key or "/" in key:
            raise DataError(
                f"sample key {key!r} is not 1 to {MAX_KEY} characters without dots (WebDataset ends a key at one) and slashes"
            )
        if key in self._samples:
            raise DataError(f"sample key {key!r} appears twice in one shard: WebDataset would merge the two")
        if not 0 <= label < self.info.classes:
            raise DataError(f"sample {key}: label {label} is outside 0..{self.info.classes - 1}")
        if (flipped is not None) != self.info.flipped:
            raise DataError(f"sample {key}: mirrored array {'missing' if self.info.flipped else 'unexpected'} in this set")
        members = [(self.info.members.label, str(label).encode())]
        for name, array in ((self.info.members.latent, latent), (self.info.members.flipped, flipped)):
            if array is not None:
                if array.shape != self.info.shape or array.dtype != self.info.dtype:
                    raise DataError(
                        f"sample {key}: {name} is {array.dtype}{array.shape}, the set is {self.info.dtype}{self.info.shape}"
                    )
                members.append((name, npy(np.ascontiguousarray(array))))
        self._samples[key] = members

    def write(self, folder: Path, name: str) -> ShardInfo:
        """Write the tar, then its index: a shard that has an index is complete."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in self._samples.items():
                for member, content in members:
                    header = tarfile.TarInfo(f"{key}.{member}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        index = index_tar(file, f"{name}.tar", self.info.members, self.info.flipped).to_json()
        whole = file.getbuffer()
        write_atomically(folder / f"{name}.tar", whole)
        write_atomically(folder / f"{name}{INDEX}", index)
        return ShardInfo(name, len(self), whole.nbytes, zlib.crc32(whole), zlib.crc32(index))


def create_set_folder(folder: Path, remedy: str = "remove it or write elsewhere") -> None:
    """Create a new set's folder. Raises UsageError, with the ``remedy``, if it holds a set; OSError if it is not writable."""
    if (folder / DATASET_FILE).exists():
        raise UsageError(f"{folder} already holds a data set; {remedy}")
    make_folder(folder)


def write_dataset_file(folder: Path, info: DatasetInfo, shards: Sequence[ShardInfo]) -> None:
    """Write the description, after everything else: a set that has one is complete."""
    description = {"format": FORMAT, **asdict(info), "shards": [asdict(shard) for shard in shards]}
    write_atomically(folder / DATASET_FILE, json.dumps(description, indent=1).encode())


class ShardWriter:
    """Write samples to shards of ``samples_per_shard``, in the order given.

    A context manager: a clean exit completes the set; after an exception there is no set, and its shards stay until the next
    writer completes one.
    """

    def __init__(
        self, folder: str | Path, info: DatasetInfo, *, prefix: str = "latents", samples_per_shard: int = 1024
    ) -> None:
        self.folder, self.info, self.prefix, self.samples_per_shard = Path(folder), info, prefix, samples_per_shard
        if samples_per_shard < 1:
            raise UsageError(f"a shard needs at least 1 sample, not {samples_per_shard}")
        check_origin(info.tokenizer, info.stored, info.shape[0])
        if (self.folder / ENCODING).exists():
            raise UsageError(f"{self.folder} holds an encoding that is not finished; finish or remove it, or write elsewhere")
        create_set_folder(self.folder)
        self.shards: list[ShardInfo] = []
        self._shard = ShardBuilder(info)

    def add(self, key: str, label: int, latent: np.ndarray, flipped: np.ndarray | None = None) -> None:
        self._shard.add(key, label, latent, flipped)
        if len(self._shard) == self.samples_per_shard:
            self._flush()

    def _flush(self) -> None:
        if len(self._shard):
            self.shards.append(self._shard.write(self.folder, shard_name(self.prefix, len(self.shards))))
            self._shard = ShardBuilder(self.info)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
            self._remove_leftovers()
            write_dataset_file(self.folder, self.info, self.shards)

    def _remove_leftovers(self) -> None:
        """Remove the shards of an earlier writer that did not finish: there may be more of them than of this set. Tars without
        an index are somebody else's, or were never complete."""
        listed = {shard.name for shard in self.shards}
        for index in self.folder.glob(f"{self.prefix}-{'[0-9]' * 6}{INDEX}"):
            if (name := index.name.removesuffix(INDEX)) not in listed:
                (self.folder / f"{name}.tar").unlink(missing_ok=True)
                index.unlink()


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:06d}"
