"""Where a CPU goes a way of its own, because it is faster there; and tensors of it that stand for a GPU's, or a graph's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class _Emulated(NamedTuple):
    gpu: bool = False
    graph: bool = False


_emulated = _Emulated()


def takes_cpu_path(x: Tensor) -> bool:
    """Not in a graph, which makes its own kernels, nor where a CPU's tensors stand for a GPU's."""
    return x.device.type == "cpu" and not in_graph() and not _emulated.gpu


def on_gpu(x: Tensor) -> bool:
    """Or as if it were."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and _emulated.gpu)


def in_graph() -> bool:
    """Whether torch.compile looks on. Or as if it did."""
    return torch.compiler.is_compiling() or _emulated.graph


@contextmanager
def emulate(*, gpu: bool, graph: bool) -> Iterator[None]:
    """What is computed here, on a CPU's tensors, takes the functions that it would on a GPU, in a graph, or both."""
    global _emulated
    before, _emulated = _emulated, _Emulated(gpu, graph)
    try:
        yield
    finally:
        _emulated = before
