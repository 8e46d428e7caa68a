"""What an encoding is to make: its settings, and which image goes into which shard."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from xar_scale.config import STRICT
from xar_scale.data.images import SourceImage


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EncodeSettings:
    """Everything that the content of a set depends on, but for the images themselves."""

    source: str  # a folder: see list_images
    tokenizer: dict[str, Any]  # name and settings
    size: PositiveInt  # of the images' sides, in pixels
    dtype: Literal["float16", "float32"]
    flipped: bool
    precision: str  # of the tokenizer's network
    batch: PositiveInt  # images a pass: kernels differ with it, in the last bits
    samples_per_shard: PositiveInt
    classes: PositiveInt | None  # None: as many as the source has folders
    image: str  # of a sample in a tar


class Plan(NamedTuple):
    """Which images a set is made of, in its order."""

    settings: EncodeSettings
    classes: int
    images: list[SourceImage]

    @property
    def shards(self) -> int:
        return -(-len(self.images) // self.settings.samples_per_shard)

    def part(self, shard: int) -> list[SourceImage]:
        size = self.settings.samples_per_shard
        return self.images[shard * size : (shard + 1) * size]

    def samples_in(self, shards: Collection[int]) -> int:
        missing = self.shards * self.settings.samples_per_shard - len(self.images)  # in the last, which may be short
        return len(shards) * self.settings.samples_per_shard - (missing if self.shards - 1 in shards else 0)
