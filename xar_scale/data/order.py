"""The global order: sample number n of a run, as a pure function of (seed, n). It knows nothing of ranks or workers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from xar_scale import rng


class Position(NamedTuple):
    """How far a run has read: whole epochs, and samples of the next one."""

    epoch: int
    consumed: int


class SampleOrder:
    """Every sample exactly once an epoch, in an order that differs from epoch to epoch.

    An epoch is the shuffled concatenation of all shards, cut between samples into ``lanes``. A lane is read in windows of
    ``window`` samples, shuffled inside. A global batch takes the same number from every lane, lane after lane: ranks that
    take a contiguous slice of it read the shards of their lanes only, and few at a time. Any number is found without replay.

    Lanes are as long as each other over the whole run, not in every epoch: after e epochs lane l has read
    floor((e * samples + l) / lanes) samples, which sums to e * samples over the lanes for any numbers (Hermite's identity). So
    lanes never drift apart by more than one sample and nothing is dropped; a batch may hold the end of one epoch and the
    beginning of the next.
    """

    def __init__(self, shard_samples: Sequence[int], seed: int, *, window: int, global_batch: int, lanes: int) -> None:
        assert global_batch % lanes == 0, "the config has seen to it"
        self.counts = np.asarray(shard_samples, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.window, self.global_batch, self.lanes = seed, window, global_batch, lanes
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._order_in_window = lru_cache(maxsize=2 * lanes)(self._shuffle_window)

    def __getstate__(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("seed", "window", "global_batch", "lanes")}
        return {"shard_samples": self.counts, **settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def position(self, number: int) -> Position:
        return Position(*divmod(number, self.samples))

    def locate(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shards, positions in them) of samples of the run, by their numbers."""
        step, inside = np.divmod(np.asarray(numbers, dtype=np.int64), self.global_batch)
        share = self.global_batch // self.lanes
        lane, turn = np.divmod(inside, share)
        read = step * share + turn  # samples that the lane has read before
        # the first epoch whose end, floor(((epoch + 1) * samples + lane) / lanes), lies beyond
        epoch = -(-((read + 1) * self.lanes - lane) // self.samples) - 1
        window, place = np.divmod(read - self._read_before(epoch, lane), self.window)
        shards, positions = np.empty_like(read), np.empty_like(read)
        groups, member = np.unique(np.stack([epoch, lane, window], axis=1), axis=0, return_inverse=True)
        for group, (e, lane_, w) in enumerate(groups.tolist()):
            of_group = member.reshape(-1) == group
            order, before, lane_begins = self._epoch(e)
            at = lane_begins[lane_] + w * self.window + self._order_in_window(e, lane_, w)[place[of_group]]
            slot = np.searchsorted(before, at, side="right") - 1
            shards[of_group], positions[of_group] = order[slot], at - before[slot]
        return shards, positions

    def _read_before(self, epoch: Any, lane: Any) -> Any:
        """Samples that a lane has read in the epochs before."""
        return (epoch * self.samples + lane) // self.lanes

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's shards in their order, the samples before each and after the last, and where each lane begins."""
        order = rng.generator(self.seed, "shards", epoch).permutation(len(self.counts))
        before = np.concatenate([[0], np.cumsum(self.counts[order])])
        return order, before, np.concatenate([[0], np.cumsum(self._lengths(epoch))])

    def _lengths(self, epoch: int) -> np.ndarray:
        lane = np.arange(self.lanes, dtype=np.int64)
        return self._read_before(epoch + 1, lane) - self._read_before(epoch, lane)

    def _shuffle_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        size = min(self.window, int(self._lengths(epoch)[lane]) - window * self.window)
        # at most 2**32 windows a lane
        return rng.generator(self.seed, f"window/{lane}", (epoch << 32) + window).permutation(size)
