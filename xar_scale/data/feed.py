"""The batches of a rank, a step at a time, from any step on."""

import time
from collections.abc import Iterator

import torch

from xar_scale import dist
from xar_scale.config import TrainConfig, micro_batches
from xar_scale.data.loader import Batch, LatentDataset, RankBatchSampler, batches


class Feed:
    """``waited``: seconds that were spent waiting for data."""

    def __init__(self, dataset: LatentDataset, config: TrainConfig, device: torch.device) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.micro, self.passes = micro_batches(config, dist.world())
        self.waited = 0.0
        self._stream: Iterator[Batch] | None = None

    def seek(self, step: int) -> None:
        """Go on from ``step``; what was read ahead is dropped, and the data set is read as it is from now on."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]  # a generator; it ends its workers
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
        """The passes of the next step."""
        asked = time.perf_counter()
        assert self._stream is not None, "seek comes first"
        taken = [next(self._stream) for _ in range(self.passes)]
        self.waited += time.perf_counter() - asked
        return taken
