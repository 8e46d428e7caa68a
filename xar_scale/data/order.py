"""The global order: sample number n of a run, as a pure function of (seed, n). It knows nothing of ranks or workers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from xar_scale import rng


class Position(NamedTuple):
    """How far a run has read: whole epochs, and samples of the next one."""

    epoch: int
    consumed: int


class SampleOrder:
    """Every sample exactly once an epoch, in an order that differs from epoch to epoch.

    An epoch is the shuffled concatenation of all shards, cut into windows of ``window`` samples; inside a window the
    samples are shuffled. So a reader stays within few shards at a time, and any position is found without replay.
    """

    def __init__(self, shard_samples: Sequence[int], seed: int, window: int) -> None:
        self.counts = np.asarray(shard_samples, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.window = seed, window
        self._shards_of_epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._order_in_window = lru_cache(maxsize=4)(self._shuffle_window)

    def __getstate__(self) -> tuple[np.ndarray, int, int]:
        return self.counts, self.seed, self.window

    def __setstate__(self, state: tuple[np.ndarray, int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in their order, and the number of samples before each and after the last."""
        order = rng.generator(self.seed, "shards", epoch).permutation(len(self.counts))
        return order, np.concatenate([[0], np.cumsum(self.counts[order])])

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        size = min(self.window, self.samples - window * self.window)
        # at most 2**32 windows an epoch
        return rng.generator(self.seed, "window", (epoch << 32) + window).permutation(size)

    def position(self, number: int) -> Position:
        return Position(*divmod(number, self.samples))

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, position in it) of sample ``number`` of the run."""
        epoch, consumed = self.position(number)
        window, inside = divmod(consumed, self.window)
        place = window * self.window + int(self._order_in_window(epoch, window)[inside])
        shards, before = self._shards_of_epoch(epoch)
        slot = int(np.searchsorted(before, place, side="right")) - 1
        return int(shards[slot]), place - int(before[slot])
