"""The micro-batches of a rank, one step at a time, from any step on."""

import time
from collections.abc import Callable, Iterator

import torch

from xar_scale import dist
from xar_scale.config import TrainConfig, micro_batches
from xar_scale.data.loader import Batch, LatentDataset, RankBatchSampler, batches
from xar_scale.errors import XarScaleError

LATE_S = 1.0  # a wait for data is interrupted this often


class Feed:
    """The rank's micro-batches. ``waited``: seconds spent waiting for data."""

    def __init__(self, dataset: LatentDataset, config: TrainConfig, device: torch.device) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.micro, self.passes = micro_batches(config, dist.world())
        self.waited = 0.0
        self._stream: Iterator[Batch | None] | None = None

    def seek(self, step: int) -> None:
        """Continue from ``step``. Drop what was read ahead; new reads see the data set (its quarantine) as it is now."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]  # a generator; closing it ends its workers
        numbers = RankBatchSampler(
            start=step,
            steps=self.config.steps,
            global_batch=self.config.global_batch,
            micro_batch=self.micro,
            rank=dist.rank(),
            world=dist.world(),
        )
        self._stream = batches(self.dataset, numbers, self.device, LATE_S)

    def take(self, give_up: Callable[[float], XarScaleError | None] = lambda waited: None) -> list[Batch]:
        """Return the micro-batches of the next step.

        Every LATE_S seconds that workers are waited for, ``give_up`` is called with the seconds waited so far. If it returns an
        error, the micro-batches are blank and end the run with that error. They have to be there: the other ranks are already
        in the collectives of this step, and would wait for this one.
        """
        asked = time.perf_counter()
        assert self._stream is not None, "call seek first"
        taken, late = list[Batch](), 0.0
        while len(taken) < self.passes:
            if (batch := next(self._stream)) is not None:
                taken.append(batch)
                continue
            late += LATE_S  # not by the clock: the process may have been suspended
            if (error := give_up(late)) is not None:
                taken = [self.dataset.blank(self.micro, error).to(self.device)] * self.passes
        self.waited += time.perf_counter() - asked
        return taken
