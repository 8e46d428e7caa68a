"""Open what ``data.path`` names: a folder, a URL, or synthetic latents."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.data.cache import NodeCache
from xar_scale.data.faults import Fault
from xar_scale.data.reader import LatentShards
from xar_scale.data.remote import RemoteFolder
from xar_scale.data.shards import DatasetInfo
from xar_scale.data.synthetic import SAMPLES, SyntheticShards
from xar_scale.errors import ConfigError
from xar_scale.files import own_temporary_folder

SYNTHETIC = "synthetic"


class Shards(Protocol):
    """A set of latents as the loader reads it. It can be pickled."""

    remote: bool  # whether prefetch has an effect
    open_shards: int  # shards kept open at a time

    @property
    def info(self) -> DatasetInfo: ...

    def faults(self) -> Iterator[Fault]: ...

    def prefetch(self, shards: Sequence[int]) -> None: ...

    def read_array(self, shard: int, position: int, *, flipped: bool) -> tuple[str, int, np.ndarray]: ...


def open_shards(config: Config) -> Shards:
    """Open ``data.path``. Raises ConfigError if it names nothing that can be opened, DataError if it is no complete set."""
    path = config.data.path
    if not path:
        raise ConfigError("data.path is not set: name the folder of latents")
    name, _, count = path.partition(":")
    if name == SYNTHETIC:
        if count and not (count.isascii() and count.isdecimal() and int(count)):
            raise ConfigError(f"data.path {path}: the number of samples must follow the colon")
        return SyntheticShards(config.model, int(count) if count else SAMPLES)
    if name == "pipe":
        raise ConfigError(f"data.path {path}: refused, because a pipe runs a program")
    if "://" not in path:
        return LatentShards(path)
    cache = NodeCache(cache_folder(config), int(config.data.cache_gb * 1e9))
    shards = LatentShards(RemoteFolder(path, cache))
    _check_room(shards.info, config)
    return shards


def cache_folder(config: Config) -> Path:
    return Path(config.data.cache) if config.data.cache else own_temporary_folder()


def _check_room(info: DatasetInfo, config: Config) -> None:
    """Raises ConfigError if the node cache cannot hold the windows that its ranks read at a time, and the next ones."""
    data = config.data
    lanes = max_lanes_read(data.lanes, dist.world(), dist.local_world())
    shards = min(2 * lanes * info.max_shards_spanned(data.window), len(info.shards))
    largest = max(shard.bytes for shard in info.shards)
    if (needed := shards * largest / 1e9) > data.cache_gb:  # both are shown unrounded, so that the number shown suffices
        raise ConfigError(
            f"data.cache_gb is {data.cache_gb}, but two windows of {data.window} samples in each of a node's {lanes} lanes "
            f"span up to {shards} shards of {largest / 1e6} MB: {needed} GB"
        )


def max_lanes_read(lanes: int, world: int, together: int) -> int:
    """Return the most lanes read by any group of ``together`` ranks (a node) of ``world``. Each rank has an equal slice."""
    groups = [(first, min(first + together, world)) for first in range(0, world, together)]
    return max(-(-end * lanes // world) - first * lanes // world for first, end in groups)
