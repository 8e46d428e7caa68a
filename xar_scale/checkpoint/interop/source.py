"""The common view of all checkpoint formats: flat float32 vectors by name, read a range at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from xar_scale.checkpoint.manifest import KINDS, Manifest, our_shape


class Reader(Protocol):
    """Reads the values of a source."""

    def read(self, key: str, start: int, out: Tensor) -> None: ...

    def close(self) -> None: ...


@dataclass
class Source:
    """A checkpoint of any format. A context manager, because it may keep files open.

    Keys are ``KIND/NAME``; kinds are model, ema, exp_avg, exp_avg_sq.
    """

    path: Path
    format: str  # for messages
    shapes: dict[str, torch.Size]
    reader: Reader
    files: list[Path]  # that hold the values
    checksums: dict[Path, str] = field(default_factory=dict)  # SHA-256 of the files for which it is known
    step: int | None = None  # training steps
    updates: int | None = None  # of those, the ones that updated weights and moments
    groups: list[dict[str, Any]] = field(default_factory=list)  # settings of the optimizer's parameter groups
    manifest: Manifest | None = None  # of an xar-scale checkpoint

    def __post_init__(self) -> None:
        self.shapes = {key: torch.Size(our_shape(key.partition("/")[2], shape)) for key, shape in self.shapes.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of which there is any vector."""
        found = {key.partition("/")[0] for key in self.shapes}
        return tuple(kind for kind in KINDS if kind in found)

    @property
    def best_kind(self) -> str:
        """The kind of the weights to sample or start from: the EMA weights if there are any."""
        return "ema" if "ema" in self.kinds else "model"

    def names(self, kind: str) -> dict[str, torch.Size]:
        """Names and shapes of one kind."""
        return {key.partition("/")[2]: shape for key, shape in self.shapes.items() if key.startswith(f"{kind}/")}

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D, float32, contiguous, on the CPU) with the elements from ``start`` on. Raises DataError."""
        self.reader.read(key, start, out)

    def whole(self, key: str) -> Tensor:
        """Return all of a vector, in its shape."""
        tensor = torch.empty(self.shapes[key])
        self.read(key, 0, tensor.view(-1))
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.reader.close()


class InMemory:
    """Reads vectors from tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, key: str, start: int, out: Tensor) -> None:
        out.copy_(self.tensors[key].reshape(-1)[start : start + out.numel()])

    def close(self) -> None:
        pass
