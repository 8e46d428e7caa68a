"""Where a CPU goes a way of its own, because it is faster there; and tensors of it that stand for a GPU's, or a graph's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class _Standing(NamedTuple):
    gpu: bool = False
    graph: bool = False


_standing = _Standing()


def goes_own_way(x: Tensor) -> bool:
    """Not in a graph, which makes its own kernels, nor where a CPU's tensors stand for a GPU's."""
    return x.device.type == "cpu" and not in_a_graph() and not _standing.gpu


def on_a_gpu(x: Tensor) -> bool:
    """Or as if it were."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and _standing.gpu)


def in_a_graph() -> bool:
    """Whether torch.compile looks on. Or as if it did."""
    return torch.compiler.is_compiling() or _standing.graph


@contextmanager
def standing_for(*, gpu: bool, graph: bool) -> Iterator[None]:
    """What is computed here, on a CPU's tensors, takes the functions that it would on a GPU, in a graph, or both."""
    global _standing
    before, _standing = _standing, _Standing(gpu, graph)
    try:
        yield
    finally:
        _standing = before
