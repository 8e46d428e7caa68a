"""Synthetic latents, which need no disk: for benchmarks of everything else."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from xar_scale import rng
from xar_scale.config import ModelConfig
from xar_scale.data.faults import Fault
from xar_scale.data.shards import DatasetInfo, ShardInfo, shard_name
from xar_scale.presets import IMAGENET_IMAGES

SAMPLES, PER_SHARD = IMAGENET_IMAGES, 1024
SCALE, LOG_VARIANCE = 0.2325, -8.0  # the KL-16 autoencoder's; about that of its posteriors
ARRAYS = 64  # distinct arrays, reused by all samples: drawing one for each would take longer than reading it


class SyntheticShards:
    """Posteriors of unit-size latents that fit ``model``, in float16 with mirrored arrays. Deterministic."""

    remote, open_shards = False, 0

    def __init__(self, model: ModelConfig, samples: int = SAMPLES) -> None:
        counts = [PER_SHARD] * (samples // PER_SHARD) + [samples % PER_SHARD] * (samples % PER_SHARD > 0)
        self.info = DatasetInfo(
            tokenizer={"name": "synthetic"},
            latent_scale=SCALE,
            stored="moments",
            shape=(2 * model.channels, *model.grid),
            dtype="float16",
            classes=model.classes,
            flipped=True,
            shards=tuple(ShardInfo(shard_name("synthetic", n), count, 1, 0, 0) for n, count in enumerate(counts)),
        )

    def faults(self) -> Iterator[Fault]:
        return iter(())

    def prefetch(self, shards: Sequence[int]) -> None:
        pass

    def read_array(self, shard: int, position: int, *, flipped: bool) -> tuple[str, int, np.ndarray]:
        """Return key, label and array, as of a stored sample."""
        number = shard * PER_SHARD + position
        array = self._arrays[number % ARRAYS]
        return f"{number:08d}", number % self.info.classes, array[..., ::-1] if flipped else array

    @cached_property
    def _arrays(self) -> np.ndarray:
        channels, rows, columns = self.info.latent_shape
        mean = rng.generator(0, "synthetic").standard_normal((ARRAYS, channels, rows, columns), dtype=np.float32) / SCALE
        return np.concatenate([mean, np.full_like(mean, LOG_VARIANCE)], axis=1).astype(np.float16)
