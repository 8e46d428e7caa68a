"""Self-contained training batches: latents and everything random about them, drawn in worker processes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Self

from xar_scale import rng
from xar_scale.config import Config
from xar_scale.data.order import SampleOrder
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DatasetInfo
from xar_scale.errors import ConfigError, DataError
from xar_scale.flow import sample_time
from xar_scale.model.entities import EntityLayout
from xar_scale.tokenizers.kl16 import MAX_LOG_VARIANCE, MIN_LOG_VARIANCE

MAX_OPEN_SHARDS = 512  # of the 1,024 files that a process may usually have open


@dataclass(frozen=True)
class Batch:
    """What a training pass needs and nothing else: replaying it needs no generator."""

    latents: Tensor  # (B, C, rows, columns)
    labels: Tensor  # (B,) int64, the null class where dropped
    t: Tensor  # (B, K)
    noise: Tensor  # (B, T, C), entity-major
    keys: tuple[str, ...]
    error: DataError | None = None  # why this batch is blank: the rank still takes part in the step, which all then discard

    @classmethod
    def together(cls, parts: Sequence[Self]) -> Self:
        """One batch of whole ones."""
        latents, labels, t, noise = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "labels", "t", "noise")
        )
        return cls(latents, labels, t, noise, tuple(key for part in parts for key in part.keys))

    def to(self, device: torch.device) -> "Batch":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(change(self.latents), change(self.labels), change(self.t), change(self.noise), self.keys, self.error)


class Draws(NamedTuple):
    """Everything random about some samples, from one block of words each (xar_scale.rng)."""

    flip: np.ndarray  # (B,) uniform
    label: np.ndarray  # (B,) uniform
    time: Tensor  # (B, K) normal
    noise: Tensor  # (B, T, C) normal
    posterior: Tensor  # (B, C, rows, columns) normal


class LatentDataset(Dataset[Batch]):
    """Sample numbers of the run -> a batch. All randomness is keyed by the number."""

    CHUNK = 64  # samples whose numbers and arrays are worked on together: what fits a core's cache

    def __init__(self, shards: LatentShards, config: Config, layout: EntityLayout) -> None:
        check_fits(shards.info, config)
        self.shards, self.config, self.layout = shards, config, layout
        self.order = SampleOrder(
            [shard.samples for shard in shards.info.shards],
            config.train.seed,
            window=config.data.window,
            global_batch=config.train.global_batch,
            lanes=config.data.lanes,
        )
        # A rank goes around the windows of its lanes: all of a run's in one process at worst, and a shard opens slowly
        at_once = config.data.lanes * (config.data.window // min(shard.samples for shard in shards.info.shards) + 2)
        shards.open_shards = min(max(shards.open_shards, at_once), MAX_OPEN_SHARDS)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """The batch of these sample numbers; where one cannot be read, a blank batch that says why."""
        try:
            parts = [self._part(numbers[begin : begin + self.CHUNK]) for begin in range(0, len(numbers), self.CHUNK)]
        except DataError as error:
            return self._blank(len(numbers), error)
        return parts[0] if len(parts) == 1 else Batch.together(parts)

    def _part(self, numbers: Sequence[int]) -> Batch:
        model, draws = self.config.model, self.draw(numbers)
        flip = (draws.flip < 0.5) & self.config.data.flip
        stored = np.empty((len(numbers), *self.shards.info.shape), self.shards.info.dtype)
        keys, labels = [], np.empty(len(numbers), dtype=np.int64)
        for row, place in enumerate(zip(*(found.tolist() for found in self.order.locate(numbers)), strict=True)):
            key, labels[row], stored[row] = self.shards.read_array(*place, flipped=bool(flip[row]))
            keys.append(key)
        labels[draws.label < self.config.train.label_drop] = model.classes
        return Batch(
            latents=self._latents(torch.from_numpy(stored).float(), draws.posterior),
            labels=torch.from_numpy(labels),
            t=sample_time(draws.time),
            noise=draws.noise,
            keys=tuple(keys),
        )

    def _latents(self, stored: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents (B, C, rows, columns), drawn from the posterior where one is stored."""
        if self.shards.info.stored == "moments":
            mean, log_variance = stored.chunk(2, dim=1)
            deviation = log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE).mul_(0.5).exp_()
            stored = deviation.mul_(noise).add_(mean)
        return stored.mul_(self.shards.info.latent_scale)

    def draw(self, numbers: Sequence[int]) -> Draws:
        """Of each number a block of words: two for the uniforms, then what the normals need, two a word."""
        model, layout = self.config.model, self.layout
        shapes = [(layout.entities,), (layout.tokens, model.channels), (model.channels, *model.grid)]
        sizes = [math.prod(shape) for shape in shapes]
        size = 2 + math.ceil(sum(sizes) / 2)
        runs = np.split(np.asarray(numbers), np.flatnonzero(np.diff(numbers) != 1) + 1)
        words = np.concatenate([rng.words(self.config.train.seed, "sample", int(run[0]), len(run), size) for run in runs])
        flip, label = rng.uniforms(words[:, :2]).T
        normals = rng.normals(words[:, 2:])[:, : sum(sizes)].split(sizes, dim=1)
        time, noise, posterior = (part.unflatten(1, shape) for part, shape in zip(normals, shapes, strict=True))
        return Draws(flip, label, time, noise.contiguous(), posterior)

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
