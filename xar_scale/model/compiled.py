"""torch.compile as it is used here: for shapes that do not change, of which there may be many."""

from collections.abc import Callable
from typing import Any

import torch

MAX_GRAPHS = 1024  # graphs of one function; PyTorch's own limit is 8, beyond which it goes on without a graph, or fails


def compile_static(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A graph for each kind of call: shapes, training or not, a precision of autocast, entities before those fed.

    PyTorch's limit of them is the process's, and is raised for good: to raise it around each call takes time in each block.
    """
    from torch._dynamo import config  # seconds, for which each process would wait

    config.recompile_limit = config.accumulated_recompile_limit = MAX_GRAPHS
    return torch.compile(function, dynamic=False, **options)
