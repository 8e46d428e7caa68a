"""Data sets of latents: what all samples of one share, and writing its shards.

A set is a folder: ``dataset.json`` (what all samples share, and the list of shards), and for each shard ``NAME.tar`` and
``NAME.index.json`` (see index.py). The tars are plain WebDataset: stock readers need no index.
"""

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from xar_scale.config import STRICT
from xar_scale.data.index import FLIPPED, LABEL, LATENT, Members, index_tar
from xar_scale.errors import DataError, UsageError
from xar_scale.files import write_atomically

FORMAT = 2
MAX_KEY = 80  # characters: with a member's ending it must fit the 100 of a tar header
DATASET_FILE = "dataset.json"


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


def npy(array: np.ndarray) -> bytes:
    """The array as a .npy file."""
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
                members.append((name, npy(np.ascontiguousarray(array))))
        self._samples.append((key, members))
        if len(self._samples) == self.samples_per_shard:
            self._flush()

    def _flush(self) -> None:
        if not self._samples:
            return
        name = f"{self.prefix}-{len(self.shards):06d}"
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in self._samples:
                for member, content in members:
                    header = tarfile.TarInfo(f"{key}.{member}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        index = index_tar(file, f"{name}.tar", Members(flipped=FLIPPED if self.info.flipped else None)).to_json()
        write_atomically(self.folder / f"{name}.tar", file.getbuffer())
        write_atomically(self.folder / f"{name}.index.json", index)
        self.shards.append(ShardInfo(name, len(self._samples), file.getbuffer().nbytes, zlib.crc32(index)))
        self._samples = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            return
        self._flush()
        description = {"format": FORMAT, **asdict(self.info), "shards": [asdict(shard) for shard in self.shards]}
        write_atomically(self.folder / DATASET_FILE, json.dumps(description, indent=1).encode())
