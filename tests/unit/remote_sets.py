"""Reading a set in an object store (fixtures ``store`` and ``url``) through the node cache."""

from pathlib import Path

from tests.conftest import digits_config
from tests.object_store import ObjectStore
from tests.unit.conftest import CPU, assert_equal
from xar_scale.data.loader import Batch, LatentDataset, RankBatchSampler, batches
from xar_scale.data.sources import open_shards
from xar_scale.model.entities import create_layout

COUNT, PER_SHARD = 40, 4  # ten shards
SETTINGS = ("train.global_batch=8", "data.lanes=2", "data.window=6", "data.prefetch=1")
ROOM = 10**9


def stream(path: str | Path, cache: Path, *more: str, workers: int = 0, steps: int = 10) -> list[Batch]:
    config = digits_config(f"data.path={path}", f"data.cache={cache}", f"data.workers={workers}", *SETTINGS, *more)
    dataset = LatentDataset(open_shards(config), config, create_layout(config.model))
    numbers = RankBatchSampler(start=0, steps=steps, global_batch=8, micro_batch=8, rank=0, world=1)
    return list(batches(dataset, numbers, CPU))


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) == 10  # two epochs
    for one, two in zip(ours, theirs, strict=True):
        assert one.faults == two.faults == ()
        assert_equal(one, two)


def shard_gets(store: ObjectStore) -> list[int]:
    return [times for path, times in store.gets.items() if path.endswith(".tar")]
