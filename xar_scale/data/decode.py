"""Batches of decoded images, prefetched by worker processes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xar_scale.data.images import BadImageError, SourceImage, load_image
from xar_scale.data.plan import Plan
from xar_scale.data.workers import DeadWorkerError, from_workers
from xar_scale.errors import ProcessError


class DecodedBatch(NamedTuple):
    """Decoded images of one shard."""

    shard: int
    last: bool  # whether it is the last batch of its shard
    sources: list[SourceImage]
    images: Tensor  # uint8 (B, I, size, size), one for each source
    bad: list[tuple[SourceImage, str]]  # bad images, each with the reason


class DecodeDataset(Dataset[DecodedBatch]):
    """Number -> batch. No batch spans two shards, so a shard's arrays do not depend on which process makes the one before."""

    def __init__(self, plan: Plan, shards: Sequence[int], channels: int) -> None:
        self.settings, self.channels = plan.settings, channels
        size = plan.settings.batch
        self.parts: list[tuple[int, bool, list[SourceImage]]] = [
            (shard, begin + size >= len(part), part[begin : begin + size])
            for shard, part in ((shard, plan.part(shard)) for shard in shards)
            for begin in range(0, len(part), size)
        ]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> DecodedBatch:
        shard, last, sources = self.parts[number]
        size = self.settings.size
        images = np.empty((len(sources), self.channels, size, size), np.uint8)
        good, bad = list[SourceImage](), list[tuple[SourceImage, str]]()
        for source in sources:
            try:
                images[len(good)] = load_image(Path(self.settings.source), source, size, self.channels)
                good.append(source)
            except BadImageError as error:
                bad.append((source, str(error)))
        return DecodedBatch(shard, last, good, torch.from_numpy(images[: len(good)]), bad)


def decode_batches(batches: DecodeDataset, workers: int) -> Iterator[DecodedBatch]:
    """Yield the batches in order, prefetched by worker processes. Raises ProcessError if one dies."""
    try:
        yield from from_workers(batches, workers, batch_size=None, collate_fn=_as_it_is)
    except MemoryError:
        raise ProcessError("out of memory while decoding") from None
    except DeadWorkerError as death:
        raise ProcessError(f"{death}; run the same command again to resume") from None


def _as_it_is(batch: Any) -> Any:
    return batch
