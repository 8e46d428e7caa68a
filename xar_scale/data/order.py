"""The global order: sample number n of a run, as a pure function of (seed, n), independent of ranks and workers."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from xar_scale import rng


class Position(NamedTuple):
    """How far a run has read: complete epochs, and samples of the next one."""

    epoch: int
    consumed: int


class Window(NamedTuple):
    """A part of a lane that is shuffled and read together."""

    epoch: int
    lane: int
    number: int  # within the lane and epoch


class SampleOrder:
    """Every sample exactly once per epoch, in an order that differs between epochs.

    An epoch is the shuffled concatenation of all shards, cut between samples into ``lanes``. A lane is read in windows of
    ``window`` samples, shuffled inside. A global batch takes the same number from every lane, lane after lane, so a rank that
    takes a contiguous slice of it reads only the shards of its lanes, a few at a time. Any number is located without replay.

    Lanes have equal length over the whole run, not within every epoch: after e epochs lane l has read
    floor((e * samples + l) / lanes) samples, which sums to e * samples over the lanes for any numbers (Hermite's identity).
    So lanes never drift apart by more than one sample, and nothing is dropped. A batch may span two epochs.
    """

    def __init__(self, shard_samples: Sequence[int], seed: int, *, window: int, global_batch: int, lanes: int) -> None:
        assert global_batch % lanes == 0, "validated by the config"
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
        """Return (shards, positions in them) for sample numbers of the run."""
        windows, place = self._windows(numbers)
        shards, positions = np.empty_like(place), np.empty_like(place)
        ends = np.flatnonzero((windows[1:] != windows[:-1]).any(axis=1)) + 1  # mostly one window for neighbours
        for begin, end in pairwise([0, *ends.tolist(), len(place)]):
            window = Window._make(windows[begin].tolist())
            order, before, _ = self._epoch(window.epoch)
            at = self._begin(window) + self._order_in_window(window)[place[begin:end]]
            slot = np.searchsorted(before, at, side="right") - 1
            shards[begin:end], positions[begin:end] = order[slot], at - before[slot]
        return shards, positions

    def windows(self, numbers: Sequence[int] | np.ndarray) -> set[Window]:
        """Return the windows that contain these sample numbers of the run."""
        return set(map(Window._make, self._windows(numbers)[0].tolist()))

    def shards_in(self, window: Window) -> list[int]:
        """Return the shards of a window, in the order of the epoch."""
        order, before, _ = self._epoch(window.epoch)
        begin = self._begin(window)
        first, last = np.searchsorted(before, [begin, begin + self._size(window) - 1], side="right") - 1
        return order[first : last + 1].tolist()

    def next_window(self, window: Window) -> Window:
        """Return the window that the lane reads next."""
        epoch, lane, number = window
        if (number + 1) * self.window < self._lengths(epoch)[lane]:
            return Window(epoch, lane, number + 1)
        epoch += 1
        while not self._lengths(epoch)[lane]:  # more lanes than samples
            epoch += 1
        return Window(epoch, lane, 0)

    def _windows(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (epoch, lane, number) of the window of each sample number (B, 3), and its position in it (B,)."""
        step, inside = np.divmod(np.asarray(numbers, dtype=np.int64), self.global_batch)
        share = self.global_batch // self.lanes
        lane, turn = np.divmod(inside, share)
        read = step * share + turn  # samples that the lane has read before this one
        # the first epoch whose end, floor(((epoch + 1) * samples + lane) / lanes), is beyond it
        epoch = -(-((read + 1) * self.lanes - lane) // self.samples) - 1
        window, place = np.divmod(read - self._read_before(epoch, lane), self.window)
        return np.stack([epoch, lane, window], axis=1), place

    def _begin(self, window: Window) -> int:
        """Return the number of samples of the epoch before this window."""
        return int(self._epoch(window.epoch)[2][window.lane]) + window.number * self.window

    def _size(self, window: Window) -> int:
        return min(self.window, int(self._lengths(window.epoch)[window.lane]) - window.number * self.window)

    def _read_before(self, epoch: Any, lane: Any) -> Any:
        """Return how many samples a lane has read in earlier epochs."""
        return (epoch * self.samples + lane) // self.lanes

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epoch's shards in order, the samples before each (and the total), and the start of each lane."""
        order = rng.generator(self.seed, "shards", epoch).permutation(len(self.counts))
        before = np.concatenate([[0], np.cumsum(self.counts[order])])
        return order, before, np.concatenate([[0], np.cumsum(self._lengths(epoch))])

    def _lengths(self, epoch: int) -> np.ndarray:
        lane = np.arange(self.lanes, dtype=np.int64)
        return self._read_before(epoch + 1, lane) - self._read_before(epoch, lane)

    def _shuffle_window(self, window: Window) -> np.ndarray:
        # at most 2**32 windows a lane
        generator = rng.generator(self.seed, f"window/{window.lane}", (window.epoch << 32) + window.number)
        return generator.permutation(self._size(window))
