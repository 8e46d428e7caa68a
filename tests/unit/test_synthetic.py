"""Synthetic latents: of the right kind, deterministic, read like stored ones."""

import pickle

import numpy as np
import pytest

from tests.conftest import digits_config
from tests.unit.conftest import CPU, assert_equal, write_set
from xar_scale.data.loader import LatentDataset, RankBatchSampler, batches
from xar_scale.data.reader import LatentShards
from xar_scale.data.sources import open_shards
from xar_scale.data.synthetic import SyntheticShards
from xar_scale.errors import ConfigError
from xar_scale.model.entities import create_layout

CONFIG = digits_config("data.path=synthetic:2500", "data.flip=true", "model.channels=16", "model.grid=[8, 16]")


def test_they_are_posteriors_of_unit_size_that_fit_the_model():
    shards = SyntheticShards(CONFIG.model, 2500)
    assert shards.info.samples == 2500 and [shard.samples for shard in shards.info.shards] == [1024, 1024, 452]
    assert (shards.info.shape, shards.info.dtype, shards.info.stored) == ((32, 8, 16), "float16", "moments")
    read = [shards.read_array(2, position, flipped=False) for position in range(452)]
    assert [key for key, _, _ in read] == [f"{number:08d}" for number in range(2048, 2500)]
    assert {label for _, label, _ in read} == set(range(CONFIG.model.classes))
    assert all(array.shape == shards.info.shape and array.dtype == np.float16 for _, _, array in read)
    assert len({array.tobytes() for _, _, array in read}) == 64
    for (_, _, array), position in zip(read, range(452), strict=True):
        mirrored = shards.read_array(2, position, flipped=True)[2]
        assert np.array_equal(mirrored, array[..., ::-1]) and not np.array_equal(mirrored, array)
    batch = LatentDataset(shards, CONFIG, create_layout(CONFIG.model)).__getitems__(range(300))
    assert batch.latents.shape == (300, 16, 8, 16) and not batch.faults
    assert batch.latents.mean().item() == pytest.approx(0, abs=0.02)
    assert batch.latents.std().item() == pytest.approx(1, abs=0.02)


def test_they_are_the_same_in_every_process_and_run():
    alone = LatentDataset(SyntheticShards(CONFIG.model, 2500), CONFIG, create_layout(CONFIG.model))
    copy = pickle.loads(pickle.dumps(alone))
    assert_equal(alone.__getitems__(range(50)), copy.__getitems__(range(50)))
    numbers = RankBatchSampler(start=0, steps=2, global_batch=128, micro_batch=64, rank=0, world=1)
    streams = [
        list(batches(LatentDataset(open_shards(config), config, create_layout(config.model)), numbers, CPU))
        for config in (CONFIG, digits_config(*_words(CONFIG), "data.workers=0"))
    ]
    for one, two in zip(*streams, strict=True):
        assert_equal(one, two)


def _words(config) -> list[str]:
    return [f"data.path={config.data.path}", "data.flip=true", "model.channels=16", "model.grid=[8, 16]"]


def test_the_path_says_how_many():
    def opened(path: str):
        return open_shards(digits_config(f"data.path={path}"))

    assert opened("synthetic").info.samples == 1_281_167
    assert opened("synthetic:1").info.samples == 1
    for wrong in ("synthetic:0", "synthetic:-1", "synthetic:1e3"):
        with pytest.raises(ConfigError, match=f"data.path {wrong}: the number of samples must follow the colon"):
            opened(wrong)


def test_a_folder_is_a_folder_and_no_path_is_named(tmp_path):
    write_set(tmp_path / "synthetic")
    shards = open_shards(digits_config(f"data.path={tmp_path / 'synthetic'}"))
    assert isinstance(shards, LatentShards) and not shards.remote
    with pytest.raises(ConfigError, match="data.path is not set: name the folder of latents"):
        open_shards(digits_config("data.path=''"))
