"""Counter-based randomness: every draw is a function of (seed, purpose, n), never of who draws it or when."""

import zlib

import numpy as np
import torch
from torch import Tensor

SEEDS = 1 << 64  # from 0 on: what is above would be one of them again


def generator(seed: int, purpose: str, n: int = 0) -> np.random.Generator:
    """A fresh generator for number ``n`` of ``purpose``, independent of every other (purpose, n) of the same seed.

    Philox is keyed by (seed, purpose); ``n`` is the upper half of its counter, so 2**128 values lie between neighbours.
    """
    counter = np.array([0, 0, n % SEEDS, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=counter))


def words(seed: int, purpose: str, first: int, count: int, size: int) -> np.ndarray:
    """(count, size) uint64: row i belongs to number ``first + i`` of ``purpose``, whoever asks and in whatever company.

    The words of neighbouring numbers lie side by side in one stream of 2**128, entered anywhere in no time, so a row costs
    nothing but its words: with this generator half of what Philox's do. ``size`` is the same for all numbers of a purpose.
    """
    stream = np.random.PCG64DXSM(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]))
    stream.advance(first * size)
    return stream.random_raw(count * size).reshape(count, size)


def uniforms(words_: np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one a word."""
    return (words_ >> np.uint64(11)) * 2.0**-53


def normals(words_BW: np.ndarray) -> Tensor:
    """Standard normals (B, 2 W), float32, two a word, by the inverse of their distribution; none is beyond 5.5.

    In place where it can be: for arrays of this size fresh memory costs more than the mathematics.
    """
    # 32 bits as -1..1, short of the ends by what float32 can tell from 1
    uniform = torch.from_numpy(words_BW.view(np.int32)).float().mul_(2.0**-31 * (1 - 2.0**-24))
    return uniform.erfinv_().mul_(2**0.5)


def _key(seed: int, purpose: str) -> np.ndarray:
    return np.array([seed % SEEDS, zlib.crc32(purpose.encode())], dtype=np.uint64)


def torch_generator(seed: int, purpose: str, n: int = 0) -> torch.Generator:
    """A CPU torch generator seeded by (seed, purpose, n)."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, n))


def torch_seed(seed: int, purpose: str, n: int = 0) -> int:
    """A 63-bit seed for a torch generator, from (seed, purpose, n). A CPU's makes no more than 2**32 streams of them: of 50,000
    images two share their noise with a probability of a quarter."""
    return int(generator(seed, purpose, n).integers(1 << 63))
