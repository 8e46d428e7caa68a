"""Counter-based randomness: every draw is a function of (seed, purpose, n), never of who draws it or when."""

import zlib

import numpy as np
import torch

_MASK64 = (1 << 64) - 1


def generator(seed: int, purpose: str, n: int = 0) -> np.random.Generator:
    """A fresh generator for number ``n`` of ``purpose``, independent of every other (purpose, n) of the same seed.

    Philox is keyed by (seed, purpose); ``n`` is the upper half of its counter, so 2**128 values lie between neighbours.
    """
    key = np.array([seed & _MASK64, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, 0, n & _MASK64, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def torch_generator(seed: int, purpose: str, n: int = 0) -> torch.Generator:
    """A CPU torch generator seeded by (seed, purpose, n)."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, n))


def torch_seed(seed: int, purpose: str, n: int = 0) -> int:
    """A 63-bit seed for a torch generator, from (seed, purpose, n)."""
    return int(generator(seed, purpose, n).integers(1 << 63))
