"""A ring of whole states in host memory: what a run rolls back to when its weights or moments are no longer finite."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from xar_scale.config import GuardConfig
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.guard import GuardState


@dataclass(frozen=True)
class Snapshot:
    """This rank's shards of weights, moments and averages after ``step`` steps, and what the guard then remembered."""

    step: int
    guard: GuardState
    tensors: list[Tensor]


class Snapshots:
    """The last ``guard.snapshots`` states that were taken. Memory is taken once and used again."""

    def __init__(self, engine: Engine, ema: EMA, settings: GuardConfig) -> None:
        self.engine, self.ema, self.settings = engine, ema, settings
        self.ring = deque[Snapshot](maxlen=settings.snapshots)
        self._spare: list[list[Tensor]] = []

    def due(self, step: int) -> bool:
        return self.settings.enabled and self.settings.snapshots > 0 and step % self.settings.snapshot_every == 0

    def take(self, step: int, guard: GuardState) -> None:
        """Copy the state, which the caller knows to be finite."""
        if len(self.ring) == self.ring.maxlen:
            self._spare.append(self.ring.popleft().tensors)
        state = _state(self.engine, self.ema)
        pinned = self.engine.device.type == "cuda"
        copies = self._spare.pop() if self._spare else [_host_memory(tensor, pinned) for tensor in state]
        for copy, tensor in zip(copies, state, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if pinned:
            torch.cuda.synchronize(self.engine.device)  # the optimizer writes to it next
        self.ring.append(Snapshot(step, guard, copies))

    def restore(self) -> Snapshot:
        """Go back to the newest one, which is used up: should it lead to the same end, the next is tried."""
        snapshot = self.ring.pop()
        for tensor, copy in zip(_state(self.engine, self.ema), snapshot.tensors, strict=True):
            tensor.copy_(copy)
        self.engine.shards_written(snapshot.step - snapshot.guard.skipped)
        self._spare.append(snapshot.tensors)
        return snapshot


def _state(engine: Engine, ema: EMA) -> list[Tensor]:
    return [tensor for shard in engine.shards() for tensor in shard[4:]] + ema.averages


def _host_memory(tensor: Tensor, pinned: bool) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
