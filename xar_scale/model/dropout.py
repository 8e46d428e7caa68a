"""Dropout: PyTorch's own; on a CPU one that draws four values' bits at once; in compiled graphs one that hashes a seed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_scale.model.cpu import in_graph, takes_cpu_path

_LEVELS = 2**16


class Dropout(nn.Module):
    """In training zeroes a share ``p`` of the values and scales up the rest, so that the mean stays."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p if self.training else 0.0)


def dropout(x: Tensor, p: float) -> Tensor:
    """Return ``x`` with dropout, drawn from the device's generator. ``p`` is rounded to multiples of 2^-16 on a CPU, of 2^-32
    in compiled graphs."""
    if not 0 < p < 1:
        return F.dropout(x, p)
    if in_graph():
        return _hashed(x, p)
    if not takes_cpu_path(x):
        return F.dropout(x, p)
    # PyTorch draws one number per value, in one thread (docs/benchmarks/2026-11-23-cpu-step.md)
    dropped = round(p * _LEVELS)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * kept.to(x.dtype).mul_(1 / (1 - p))


def _hashed(x: Tensor, p: float) -> Tensor:
    """Keep or drop each value by a hash of its index and of a seed.

    A compiled graph's own random numbers are ten rounds of Philox per value: they take longer than what they are fused with,
    and the mask is kept for the backward pass. The hash is recomputed there: only the seed is kept
    (docs/benchmarks/2026-11-27-h200.md).
    """
    seed = _seed(torch.empty(0, device=x.device))
    places = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    kept = _mix(_mix(places ^ seed[0]) ^ seed[1]) >= round(p * 2**32) - 2**31
    return torch.where(kept, x * (1 / (1 - p)), 0)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser: each output bit depends on all input bits."""
    x = (x ^ _shifted(x, 16)) * (0x85EBCA6B - 2**32)
    x = (x ^ _shifted(x, 13)) * (0xC2B2AE35 - 2**32)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right, as for unsigned numbers."""
    return (x >> bits) & (2 ** (32 - bits) - 1)


# The tag keeps a graph from merging two draws into one
@torch.library.custom_op("xar_scale::dropout_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _seed(like: Tensor) -> Tensor:
    """Draw two words. An opaque operation: traced into the graph, the draw would be repeated for each value."""
    return torch.randint(2**31 - 1, (2,), dtype=torch.int32, device=like.device)


@_seed.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty(2, dtype=torch.int32, device=like.device)
