"""The plan of an encoding: its settings, and which image goes into which shard."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from xar_scale.data.images import SourceImage
from xar_scale.validation import STRICT


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EncodeSettings:
    """Everything that the content of a set depends on, except the images themselves."""

    source: str  # a folder: see list_images
    tokenizer: dict[str, Any]  # name and settings
    size: PositiveInt  # side of the square images, in pixels
    dtype: Literal["float16", "float32"]
    flipped: bool
    precision: str  # of the tokenizer's network
    batch: PositiveInt  # images per forward pass: kernels differ with it, in the last bits
    samples_per_shard: PositiveInt
    classes: PositiveInt | None  # None: the number of folders in the source
    image: str  # extension of a sample's image in a tar


class Plan(NamedTuple):
    """The images of a set, in its order."""

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
        missing = self.shards * self.settings.samples_per_shard - len(self.images)  # in the last shard, which may be short
        return len(shards) * self.settings.samples_per_shard - (missing if self.shards - 1 in shards else 0)
