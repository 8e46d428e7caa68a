"""The micro-batches of a rank, one step at a time, from any step on."""

import time
from collections.abc import Iterator

import torch

from xar_scale import dist
from xar_scale.config import TrainConfig, micro_batches
from xar_scale.data.loader import Batch, LatentDataset, RankBatchSampler, batches


class Feed:
    """The rank's micro-batches. ``waited``: seconds spent waiting for data."""

    def __init__(self, dataset: LatentDataset, config: TrainConfig, device: torch.device) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.micro, self.passes = micro_batches(config, dist.world())
        self.waited = 0.0
        self._stream: Iterator[Batch] | None = None

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
        self._stream = batches(self.dataset, numbers, self.device)

    def take(self) -> list[Batch]:
        """Return the micro-batches of the next step."""
        asked = time.perf_counter()
        assert self._stream is not None, "call seek first"
        taken = [next(self._stream) for _ in range(self.passes)]
        self.waited += time.perf_counter() - asked
        return taken
