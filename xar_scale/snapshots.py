"""A ring of full states in host memory, to which a run rolls back when its weights or moments are no longer finite."""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from xar_scale.config import GuardConfig
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.guard import GuardState
from xar_scale.staging import Staging


@dataclass(frozen=True)
class Snapshot:
    """This rank's shards of weights, moments and EMA weights after ``step`` steps, and the guard's state then."""

    step: int
    guard: GuardState
    staged: Staging


class Snapshots:
    """The last ``guard.snapshots`` states taken. Memory is allocated once and reused."""

    def __init__(self, engine: Engine, ema: EMA, settings: GuardConfig) -> None:
        self.engine, self.ema, self.settings = engine, ema, settings
        self.ring = deque[Snapshot](maxlen=settings.snapshots)
        self._spare: list[Staging] = []

    def due(self, step: int) -> bool:
        return self.settings.enabled and self.settings.snapshots > 0 and step % self.settings.snapshot_every == 0

    def take(self, step: int, guard: GuardState) -> None:
        """Copy the state, which the caller has checked to be finite."""
        if len(self.ring) == self.ring.maxlen:
            self._spare.append(self.ring.popleft().staged)
        state = _state(self.engine, self.ema)
        staged = self._spare.pop() if self._spare else Staging(state)
        staged.take(state)
        self.ring.append(Snapshot(step, guard, staged))

    def restore(self) -> Snapshot:
        """Restore the newest snapshot and drop it from the ring: if it fails the same way, the one before it comes next."""
        snapshot = self.ring.pop()
        for tensor, copy in zip(_state(self.engine, self.ema), snapshot.staged.copies, strict=True):
            tensor.copy_(copy)
        self.engine.shards_written(snapshot.step - snapshot.guard.skipped)
        self._spare.append(snapshot.staged)
        return snapshot


def _state(engine: Engine, ema: EMA) -> list[Tensor]:
    return [tensor for shard in engine.shards() for tensor in shard[4:]] + ema.tensors
