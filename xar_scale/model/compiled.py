"""torch.compile as it is used here: for shapes that do not change, of which there may be many."""

from collections.abc import Callable
from typing import Any

import torch

MOST = 1024  # graphs of one function; PyTorch's own limit is 8, beyond which it goes on without a graph, or fails


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A graph for each kind of call: shapes, training or not, a precision of autocast, entities before those fed."""
    from torch._dynamo import config  # seconds, for which each process would wait

    more = config.patch({"recompile_limit": MOST, "accumulated_recompile_limit": MOST})
    return more(torch.compile(function, dynamic=False, **options))
