"""Read ``torch.save`` files without their values: locate each tensor in the file. Nothing that could run is unpickled."""

import argparse
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor

from xar_scale.checkpoint.chunks import Chunk
from xar_scale.errors import DataError, UsageError, is_damage

ZIP = b"PK\x03\x04"
LOCAL = struct.Struct("<26x2H")  # local header of a zip entry: lengths of its name and of the extra field before the content


class PlainObject:
    """Stub for a DeepSpeed class of which only the attributes matter."""


class PlainInt(int):
    """Stub for a DeepSpeed enumeration."""


# Needed besides plain values: arguments of the published code, and classes of DeepSpeed (0.19.8), none of whose code runs
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (PlainObject, "deepspeed.utils.tensor_fragment.fragment_address"),
    (PlainObject, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (PlainObject, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (PlainInt, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass(frozen=True)
class Pickled:
    """What a file holds. Its tensors have no values, unless it has the old format, which must be read whole."""

    path: Path
    value: Any
    whole: bool
    storages: dict[int, int] = field(default_factory=dict)  # offset in the file -> bytes

    def chunk(self, tensor: Tensor, start: int = 0, first: int = 0, count: int | None = None) -> Chunk:
        """Return elements [first, first + count) of a tensor, as those from ``start`` on of a vector."""
        if not tensor.is_contiguous():
            raise DataError(f"{self.path}: a tensor of shape {tuple(tensor.shape)} is not contiguous")
        count = tensor.numel() - first if count is None else count
        if not 0 <= count <= tensor.numel() - first:
            raise DataError(f"{self.path}: needs elements {first} to {first + count} of a tensor that has {tensor.numel()}")
        storage: Any = tensor.untyped_storage()
        offset = 0 if count == 0 else storage._checkpoint_offset  # torch 2.11 to 2.15
        if count and self.storages.get(offset) != storage.nbytes():
            raise DataError(_repacked(self.path))
        offset += tensor.dtype.itemsize * (int(tensor.storage_offset()) + first)
        return Chunk(start, start + count, self.path, offset, tensor.dtype)

    def number(self, value: Any) -> float:
        """Return a number that may be stored as a tensor."""
        if not isinstance(value, Tensor):
            return float(value)
        if self.whole:
            return float(value)
        with self.path.open("rb") as file:
            file.seek(self.chunk(value).offset)
            return float(torch.frombuffer(bytearray(file.read(value.dtype.itemsize)), dtype=value.dtype))


def is_pickled(path: Path) -> bool:
    return path.suffix in (".pt", ".pth", ".ckpt", ".bin")


def read_pickled(path: Path, trust_pickle: bool = False) -> Pickled:
    """Raises DataError naming the class if the file needs more than plain values, unless ``trust_pickle``."""
    if not path.is_file():
        raise UsageError(f"no file at {path}")
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            if not is_zip:
                return Pickled(path, torch.load(path, map_location="cpu", weights_only=not trust_pickle), whole=True)
            from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

            storages = _storages(path)
            with FakeTensorMode():
                value = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
            return Pickled(path, value, whole=False, storages=storages)
    except Exception as error:
        if not is_damage(error) and not isinstance(error, MemoryError):  # 32 bytes can ask for a hundred gigabytes
            raise
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(
                f"{path} needs {match[1]}, which unpickling would run; --trust-pickle (in Python, trust_pickle) allows it"
            ) from None
        detail = "" if isinstance(error, UnpicklingError) else str(error).partition("\n")[0]  # it would be pages of advice
        detail = detail and f": {detail}"
        raise DataError(f"{path} is torn, or not a torch.save file{detail}") from None


def _storages(path: Path) -> dict[int, int]:
    """Return offset and size in bytes of each storage in an archive, from the archive's own records.

    Without values, torch.load computes the offsets from the order in which torch.save numbers and writes storages. Other
    programs that pack the same files may change that order or compress them: DataError.
    """
    storages: dict[int, int] = {}
    numbers: list[int] = []
    with ZipFile(path) as archive, path.open("rb") as file:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset):
            folder, _, number = entry.filename.rpartition("/")
            if entry.compress_type:  # torch.save never does; it might expand to more than memory
                raise DataError(_repacked(path))
            if entry.filename.endswith("/byteorder") and archive.read(entry) == b"big":  # torch would swap missing values
                raise DataError(f"{path} was written on a machine of the other byte order")
            if not folder.endswith("/data") or entry.is_dir():
                continue
            if not number.isdecimal():
                raise DataError(_repacked(path))
            storages[content_offset(file, entry)] = entry.file_size
            numbers.append(int(number))
        ordered = any(entry.filename.endswith("/.format_version") for entry in archive.infolist())
    if ordered and numbers != sorted(numbers):
        raise DataError(_repacked(path))
    return storages


def content_offset(file: BinaryIO, entry: ZipInfo) -> int:
    """Return the offset in an archive of an entry's content."""
    file.seek(entry.header_offset)
    return entry.header_offset + LOCAL.size + sum(LOCAL.unpack(file.read(LOCAL.size)))


def _repacked(path: Path) -> str:
    return f"{path} was repacked: its values are not where torch.save puts them; load it and save it again"
