"""Where a CPU goes a way of its own, because it is faster there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_own_ways = True


def goes_own_way(x: Tensor) -> bool:
    """Not in a graph, which makes its own kernels, nor where a CPU's tensors stand for a GPU's."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and _own_ways


def on_a_gpu(x: Tensor) -> bool:
    """Or as if it were."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and not _own_ways)


@contextmanager
def standing_for_a_gpu() -> Iterator[None]:
    """What is computed here takes the functions that it would on a GPU."""
    global _own_ways
    before, _own_ways = _own_ways, False
    try:
        yield
    finally:
        _own_ways = before
