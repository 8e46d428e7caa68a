"""Self-contained training batches: latents and everything random about them, drawn in worker processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xar_scale import rng
from xar_scale.config import Config
from xar_scale.data.order import SampleOrder
from xar_scale.data.shards import DatasetInfo, LatentShards, Sample
from xar_scale.errors import ConfigError, DataError
from xar_scale.flow import sample_time
from xar_scale.model.entities import EntityLayout
from xar_scale.tokenizers.kl16 import MAX_LOG_VARIANCE, MIN_LOG_VARIANCE


@dataclass(frozen=True)
class Batch:
    """What a training pass needs and nothing else: replaying it needs no generator."""

    latents: Tensor  # (B, C, rows, columns)
    labels: Tensor  # (B,) int64, the null class where dropped
    t: Tensor  # (B, K)
    noise: Tensor  # (B, T, C), entity-major
    keys: tuple[str, ...]
    error: DataError | None = None  # why this batch is blank: the rank still takes part in the step, which all then discard

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(change(self.latents), change(self.labels), change(self.t), change(self.noise), self.keys, self.error)


class LatentDataset(Dataset[Batch]):
    """Sample numbers of the run -> a batch. All randomness is keyed by the number (see xar_scale.rng)."""

    def __init__(self, shards: LatentShards, config: Config, layout: EntityLayout) -> None:
        check_fits(shards.info, config)
        self.shards, self.config, self.layout = shards, config, layout
        self.seed = config.train.seed
        self.order = SampleOrder([shard.samples for shard in shards.info.shards], self.seed, config.data.window)

    def __getitems__(self, numbers: list[int]) -> Batch:
        """The batch of these sample numbers; where one cannot be read, a blank batch that says why."""
        try:
            samples = [self.shards.read(*self.order.locate(number)) for number in numbers]
        except DataError as error:
            return self._blank(len(numbers), error)
        shape = (self.layout.tokens, self.config.model.channels)
        latents = np.stack([self._latent(sample, n) for sample, n in zip(samples, numbers, strict=True)])
        labels = [self._label(sample, n) for sample, n in zip(samples, numbers, strict=True)]
        time = np.stack([self._normal("time", n, (self.layout.entities,)) for n in numbers])
        noise = np.stack([self._normal("noise", n, shape) for n in numbers])
        return Batch(
            latents=torch.from_numpy(latents),
            labels=torch.tensor(labels, dtype=torch.int64),
            t=sample_time(torch.from_numpy(time)),
            noise=torch.from_numpy(noise),
            keys=tuple(sample.key for sample in samples),
        )

    def _blank(self, size: int, error: DataError) -> Batch:
        model, layout = self.config.model, self.layout
        return Batch(
            latents=torch.zeros(size, model.channels, *model.grid),
            labels=torch.zeros(size, dtype=torch.int64),
            t=torch.zeros(size, layout.entities),
            noise=torch.zeros(size, layout.tokens, model.channels),
            keys=(),
            error=error,
        )

    def _normal(self, purpose: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
        return rng.generator(self.seed, purpose, number).standard_normal(shape, dtype=np.float32)

    def _uniform(self, purpose: str, number: int) -> float:
        return rng.generator(self.seed, purpose, number).random()

    def _latent(self, sample: Sample, number: int) -> np.ndarray:
        """Scaled latents (C, rows, columns): of the image or its mirror image, drawn from the posterior where one is stored."""
        flip = self.config.data.flip and self._uniform("flip", number) < 0.5
        stored = (sample.flipped if flip and sample.flipped is not None else sample.latent).astype(np.float32)
        if self.shards.info.stored == "moments":
            mean, log_variance = np.split(stored, 2)
            deviation = np.exp(0.5 * np.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE))
            stored = mean + deviation * self._normal("posterior", number, mean.shape)
        return stored * np.float32(self.shards.info.latent_scale)

    def _label(self, sample: Sample, number: int) -> int:
        dropped = self._uniform("label_drop", number) < self.config.train.label_drop
        return self.config.model.classes if dropped else sample.label


def check_fits(info: DatasetInfo, config: Config) -> None:
    """Raises ConfigError when the model is not made for these latents."""
    model = config.model
    if info.latent_shape != (model.channels, *model.grid):
        raise ConfigError(
            f"latents in {config.data.path} are {info.latent_shape} (channels, rows, columns), "
            f"the model takes {(model.channels, *model.grid)}"
        )
    if info.classes > model.classes:
        raise ConfigError(f"the data set has {info.classes} classes, model.classes is {model.classes}")
    if config.data.flip and not info.flipped:
        raise ConfigError(f"data.flip is on, but {config.data.path} holds no mirrored latents")


class RankNumbers:
    """The sample numbers of one rank's passes, from step ``start`` on: a contiguous slice of every global batch."""

    def __init__(self, *, start: int, steps: int, global_batch: int, micro_batch: int, rank: int, world: int) -> None:
        self.start, self.steps, self.global_batch, self.micro_batch = start, steps, global_batch, micro_batch
        self.rank, self.share = rank, global_batch // world

    def __len__(self) -> int:
        return (self.steps - self.start) * (self.share // self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            begin = step * self.global_batch + self.rank * self.share
            for first in range(begin, begin + self.share, self.micro_batch):
                yield list(range(first, first + self.micro_batch))


def batches(dataset: LatentDataset, numbers: RankNumbers, device: torch.device) -> Iterator[Batch]:
    """The rank's batches in order, read ahead by worker processes; their number does not change a bit of what comes."""
    settings = dataset.config.data
    ahead: dict[str, Any] = {"prefetch_factor": settings.prefetch, "persistent_workers": True} if settings.workers else {}
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_sampler=numbers,
        num_workers=settings.workers,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        **ahead,
    )
    for batch in loader:
        yield batch.to(device)


def _as_it_is(batch: Any) -> Any:
    return batch
