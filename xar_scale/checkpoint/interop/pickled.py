"""Files of ``torch.save`` without their values: where in the file each tensor lies. Nothing is unpickled that could run."""

import argparse
import errno
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from xar_scale.checkpoint.pieces import Piece
from xar_scale.errors import DataError, UsageError

ZIP = b"PK\x03\x04"


class PlainObject:
    """Stands for a class of DeepSpeed's, of which only the attributes matter."""


class PlainInt(int):
    """Stands for an enumeration of DeepSpeed's."""


# What files of others hold beside plain values: arguments of the published code, and DeepSpeed's (0.19.8), of which none runs
HARMLESS: list[Any] = [
    argparse.Namespace,
    (PlainObject, "deepspeed.utils.tensor_fragment.fragment_address"),
    (PlainObject, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (PlainObject, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (PlainInt, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass(frozen=True)
class Pickled:
    """What a file holds. Its tensors have no values, unless it is of the old format, which has to be read whole."""

    path: Path
    value: Any
    whole: bool

    def piece(self, tensor: Tensor, start: int = 0, first: int = 0, count: int | None = None) -> Piece:
        """Elements [first, first + count) of a tensor, which are those from ``start`` on of a vector."""
        if not tensor.is_contiguous():
            raise DataError(f"{self.path}: a tensor of shape {tuple(tensor.shape)} is not contiguous")
        count = tensor.numel() - first if count is None else count
        if not 0 <= count <= tensor.numel() - first:
            raise DataError(f"{self.path}: elements {first} to {first + count} of a tensor that has {tensor.numel()}")
        storage: Any = tensor.untyped_storage()
        offset = 0 if count == 0 else storage._checkpoint_offset  # torch 2.11 to 2.15
        offset += tensor.dtype.itemsize * (int(tensor.storage_offset()) + first)
        return Piece(start, start + count, self.path, offset, tensor.dtype)

    def number(self, value: Any) -> float:
        """A number, whether or not it is in a tensor."""
        if not isinstance(value, Tensor):
            return float(value)
        if self.whole:
            return float(value)
        with self.path.open("rb") as file:
            file.seek(self.piece(value).offset)
            return float(torch.frombuffer(bytearray(file.read(value.dtype.itemsize)), dtype=value.dtype))


def is_pickled(path: Path) -> bool:
    return path.suffix in (".pt", ".pth", ".ckpt", ".bin")


def read_pickled(path: Path, trust_pickle: bool = False) -> Pickled:
    """Raises DataError naming the class where the file asks for more than plain values, unless ``trust_pickle``."""
    if not path.is_file():
        raise UsageError(f"no file at {path}")
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
    try:
        with torch.serialization.safe_globals(HARMLESS):
            if not is_zip:
                return Pickled(path, torch.load(path, map_location="cpu", weights_only=not trust_pickle), whole=True)
            from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second

            with FakeTensorMode():
                return Pickled(path, torch.load(path, map_location="cpu", weights_only=not trust_pickle), whole=False)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a seek to before a torn archive's beginning
            raise
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            raise DataError(
                f"{path} asks for {match[1]}, which unpickling would run; --trust-pickle (in Python, trust_pickle) lets it"
            ) from None
        said = "" if isinstance(error, UnpicklingError) else str(error).partition("\n")[0]  # else pages of advice
        said = said and f": {said}"
        raise DataError(f"{path} is torn, or not a file of torch.save{said}") from None
