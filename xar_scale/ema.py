"""Exponential moving average of the weights, each rank of its own shard: no communication, no gather."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """Averages ``weights``, which it only reads; element i of ``averages`` belongs to element i of ``weights``."""

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.averages = [weight.clone() for weight in self.weights]
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """averages <- decay * averages + (1 - decay) * weights."""
        torch._foreach_lerp_(self.averages, self.weights, 1 - self.decay)
