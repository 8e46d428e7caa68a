"""torch.compile as used here: one graph per static shape, of which there may be many."""

from collections.abc import Callable
from typing import Any

import torch

MAX_GRAPHS = 1024  # of one function; PyTorch's own limit is 8, beyond which it runs eagerly, or fails


def compile_static(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return ``function`` compiled, with a graph per kind of call: shapes, training or not, autocast dtype, first entity fed.

    PyTorch's limit on graphs is per process and is raised permanently: raising it around each call costs time in each block.
    """
    from torch._dynamo import config  # imported here: it takes seconds, which every process would pay

    config.recompile_limit = config.accumulated_recompile_limit = MAX_GRAPHS
    return torch.compile(function, dynamic=False, **options)
