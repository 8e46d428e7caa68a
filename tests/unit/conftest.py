"""What several unit tests build: a small model, a layout of unequal entities, small data sets on disk."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import digits_config
from xar_scale.cli import main
from xar_scale.config import AttentionBackend
from xar_scale.data import remote
from xar_scale.data.cache import NodeCache
from xar_scale.data.loader import Batch, LatentDataset
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DatasetInfo, Sample, ShardWriter
from xar_scale.flow import velocity_loss
from xar_scale.model.entities import EntityLayout, create_layout
from xar_scale.model.xar import XAR, create_model

CLASSES = 10
CPU = torch.device("cpu")


def nano_model(**changes) -> XAR:
    """A nano model on a 4x4 grid of four cells."""
    return create_model("nano", **({"grid": (4, 4), "channels": 4, "classes": CLASSES} | changes))


def with_backend(model: XAR, backend: AttentionBackend) -> XAR:
    """The model, with this attention from now on."""
    for block in model.blocks:
        block.attn.backend = backend
    return model


def shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def unequal_layout() -> EntityLayout:
    """Entities of 1, 3, 2 and 4 tokens, in no particular order, on a 2x5 grid."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    return EntityLayout(grids=((2, 5),), lengths=(1, 3, 2, 4), order=order)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_info(**changes) -> DatasetInfo:
    values = {
        "tokenizer": {"name": "pixel", "patch": 2},
        "latent_scale": 1.0,
        "stored": "latents",
        "shape": (4, 4, 4),
        "dtype": "float16",
        "classes": CLASSES,
        "flipped": False,
    }
    return DatasetInfo(**(values | changes))


def small_samples(count: int, info: DatasetInfo) -> list[Sample]:
    generator = np.random.default_rng(count)

    def array() -> np.ndarray:
        return generator.standard_normal(info.shape).astype(info.dtype)

    return [Sample(f"s{n:04d}", 3 * n % CLASSES, array(), array() if info.flipped else None) for n in range(count)]


def assert_same_samples(read, written):
    assert [(sample.key, sample.label) for sample in read] == [(sample.key, sample.label) for sample in written]
    for got, expected in zip(read, written, strict=True):
        assert got.latent.dtype == expected.latent.dtype and np.array_equal(got.latent, expected.latent)
        assert (got.flipped is None) == (expected.flipped is None)
        assert expected.flipped is None or np.array_equal(got.flipped, expected.flipped)


def write_set(
    folder: Path, count: int = 10, *, per_shard: int = 4, samples: list[Sample] | None = None, **changes
) -> list[Sample]:
    """A data set in ``folder``, of ``count`` random samples or of those given; returns its samples in order."""
    info = small_info(**changes)
    samples = small_samples(count, info) if samples is None else samples
    with ShardWriter(folder, info, samples_per_shard=per_shard) as writer:
        for sample in samples:
            writer.add(*sample)
    return samples


def read_set(folder: Path) -> list[Sample]:
    shards = LatentShards(folder)
    return [shards.read(number, at) for number, shard in enumerate(shards.info.shards) for at in range(shard.samples)]


def open_set(folder, *overrides: str) -> LatentDataset:
    config = digits_config(f"data.path={folder}", "data.window=6", "data.prefetch=1", *overrides)
    return LatentDataset(LatentShards(folder), config, create_layout(config.model))


def assert_equal(one: Batch, two: Batch) -> None:
    assert one.keys == two.keys
    for name in ("latents", "labels", "t", "noise"):
        ours, theirs = getattr(one, name), getattr(two, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def assert_ends(capsys, arguments: list, code: int, *parts: str) -> None:
    assert main([str(word) for word in arguments]) == code
    said = capsys.readouterr().err
    assert said.startswith("xar-scale: ") and said.count("\n") == 1, said
    assert all(part in said for part in parts), said


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Images to encode."""
    from tests.unit import encoding

    root = tmp_path_factory.mktemp("images")
    encoding.make_tree(root)
    return root


@pytest.fixture(scope="session")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The files of their set, as one process makes it that is not interrupted."""
    from tests.unit import encoding

    out = tmp_path_factory.mktemp("whole") / "set"
    encoding.encode(out, source)
    return encoding.files(out)


@pytest.fixture(scope="session")
def store():
    """A real object store. One for all tests: fsspec keeps its connections for the life of a process."""
    from tests.object_store import object_store  # takes a second to import, for those who need it

    with object_store() as store:
        yield store


@pytest.fixture
def stored(tmp_path):
    """A set of ten shards, in a folder."""
    write_set(tmp_path / "set", 40)
    return tmp_path / "set"


@pytest.fixture
def url(store, stored, monkeypatch):
    """The same in the store."""
    store.gets.clear()
    monkeypatch.setattr(store, "fault", store.fault)  # put back afterwards
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    return store.put(stored, f"bucket{time.monotonic_ns()}")


@pytest.fixture
def cache(tmp_path):
    """Of a node, with room for all."""
    return NodeCache(tmp_path / "cache", 10**9)


def loss_of(model):
    layout = model.layout
    noise, t = normal(1, 2, layout.tokens, 4, dtype=torch.float32), normal(2, 2, layout.entities, dtype=torch.float32).sigmoid()
    return velocity_loss(model, layout, normal(0, 2, 4, 4, 4, dtype=torch.float32), noise, t, torch.tensor([1, 2]))


@pytest.fixture
def bucket(store, monkeypatch):
    """The URL of an empty folder in the store."""
    import boto3

    monkeypatch.setattr(store, "fault", store.fault)  # restored afterwards
    name = f"bucket{time.monotonic_ns()}"
    boto3.client("s3", endpoint_url=store.url).create_bucket(Bucket=name)
    return f"s3://{name}/runs/one"
