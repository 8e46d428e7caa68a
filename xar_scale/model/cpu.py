"""Where a CPU takes a code path of its own, because it is faster; and CPU tensors that emulate a GPU or a compiled graph."""

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
    """Whether ``x`` takes the CPU path: not in a compiled graph, which has its own kernels, nor where a GPU is emulated."""
    return x.device.type == "cpu" and not in_graph() and not _emulated.gpu


def on_gpu(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU, or emulates one."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and _emulated.gpu)


def in_graph() -> bool:
    """Whether torch.compile is tracing, or is emulated."""
    return torch.compiler.is_compiling() or _emulated.graph


@contextmanager
def emulate(*, gpu: bool, graph: bool) -> Iterator[None]:
    """A context in which CPU tensors take the code paths of a GPU, of a compiled graph, or both."""
    global _emulated
    before, _emulated = _emulated, _Emulated(gpu, graph)
    try:
        yield
    finally:
        _emulated = before
