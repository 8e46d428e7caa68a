"""Counter-based randomness: every draw is a function of (seed, purpose, n), whichever process draws it and when."""

import zlib

import numpy as np
import torch
from torch import Tensor

SEEDS = 1 << 64  # seeds are below this; larger ones would wrap around


def generator(seed: int, purpose: str, n: int = 0) -> np.random.Generator:
    """Return a fresh generator for number ``n`` of ``purpose``, independent of every other (purpose, n) of the same seed.

    Philox is keyed by (seed, purpose); ``n`` is the upper half of its counter, so 2**128 values lie between neighbours.
    """
    counter = np.array([0, 0, n % SEEDS, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=counter))


def words(seed: int, purpose: str, first: int, count: int, size: int) -> np.ndarray:
    """Return (count, size) uint64 words: row i belongs to number ``first + i`` of ``purpose``, in whatever batch it is drawn.

    The words of neighbouring numbers are adjacent in one stream of 2**128, which can be entered anywhere at no cost. So a row
    costs only its words, and with this generator half of Philox's. ``size`` must be the same for all numbers of a purpose.
    """
    stream = np.random.PCG64DXSM(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]))
    stream.advance(first * size)
    return stream.random_raw(count * size).reshape(count, size)


def uniforms(words_: np.ndarray) -> np.ndarray:
    """Return float64 values in [0, 1), one per word."""
    return (words_ >> np.uint64(11)) * 2.0**-53


def normals(words_BW: np.ndarray) -> Tensor:
    """Return standard normals (B, 2 W), float32, two per word, by the inverse distribution function; none is beyond 5.5.

    Computed in place where possible: for arrays of this size fresh memory costs more than the mathematics.
    """
    # map 32 bits into (-1, 1), short of the ends by the smallest margin that float32 can tell from 1
    uniform = torch.from_numpy(words_BW.view(np.int32)).float().mul_(2.0**-31 * (1 - 2.0**-24))
    return uniform.erfinv_().mul_(2**0.5)


def _key(seed: int, purpose: str) -> np.ndarray:
    return np.array([seed % SEEDS, zlib.crc32(purpose.encode())], dtype=np.uint64)


def torch_generator(seed: int, purpose: str, n: int = 0) -> torch.Generator:
    """Return a CPU torch generator seeded by (seed, purpose, n)."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, n))


def torch_seed(seed: int, purpose: str, n: int = 0) -> int:
    """Return a 63-bit seed for a torch generator, from (seed, purpose, n).

    A CPU generator makes at most 2**32 distinct streams: among 50,000 images, two share their noise with a probability of 1/4.
    """
    return int(generator(seed, purpose, n).integers(1 << 63))
