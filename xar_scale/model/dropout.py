"""Dropout: PyTorch's own, and on a CPU one that draws the bits of four values at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_scale.model.cpu import goes_own_way

_LEVELS = 2**16


class Dropout(nn.Module):
    """In training a share ``p`` of the values becomes 0, and the rest grows, so that the mean stays."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p if self.training else 0.0)


def dropout(x: Tensor, p: float) -> Tensor:
    """Of a share ``p`` of the values, drawn from the device's generator; on a CPU a multiple of 2^-16."""
    if not 0 < p < 1 or not goes_own_way(x):
        return F.dropout(x, p)
    # PyTorch draws one number a value, in one thread (docs/benchmarks/2026-11-23-cpu-step.md)
    dropped = round(p * _LEVELS)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * kept.to(x.dtype).mul_(1 / (1 - p))
