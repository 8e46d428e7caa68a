"""FSDP2 in one process: steps as in plain PyTorch, who writes what, and private names that change between releases."""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.conftest import random_batch
from tests.unit.tiny_engine import engine_of, losses, state, take_over
from xar_scale import dist
from xar_scale.checkpoint import vectors
from xar_scale.checkpoint.chunks import read_header
from xar_scale.checkpoint.files import Range, file_name, write_file
from xar_scale.checkpoint.load import parts_of, state_vectors
from xar_scale.checkpoint.manifest import Checkpoint
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.engines.fsdp2 import _policies, owned_range

CPU = torch.device("cpu")


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def engine_in(precision: str, engine: str = "fsdp2") -> Engine:
    return engine_of(f"train.precision={precision}", f"train.engine={engine}")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("first", "then"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_changed_precision_equals_that_of_a_fresh_engine(first, then):
    batch = [random_batch(0)]
    expected = engine_in(then).attempt(0, batch)
    engine = engine_in(first)
    other = engine.attempt(0, batch)
    engine.discard()
    engine.set_precision(then)
    found = engine.attempt(0, batch)
    assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm) != (other.loss, other.grad_norm)


@pytest.mark.usefixtures("one_rank")
def test_its_steps_match_plain_pytorch():
    engine, plain = engine_in("fp32"), engine_in("fp32", "single")
    assert losses(engine, 0, 1, 2) == pytest.approx(losses(plain, 0, 1, 2), rel=1e-6)
    torch.testing.assert_close(state(engine), state(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_training_continues_from_what_is_written_to_its_shards():
    """Weights gathered before are gathered again, and Adam's bias correction uses the steps that its moments have seen."""
    trained, engine = engine_in("fp32"), engine_in("fp32")
    losses(trained, 0, 1, 2)
    engine.losses(random_batch(0))
    take_over(engine, trained, 3)
    assert losses(engine, 3) == losses(trained, 3)
    assert all(torch.equal(one, other) for one, other in zip(state(engine), state(trained), strict=True))


@pytest.mark.usefixtures("one_rank")
def test_blocks_are_gathered_in_16_bits_and_the_rest_and_all_gradients_in_float32():
    engine = engine_in("bf16")
    *blocks, rest = [(policy.param_dtype, policy.reduce_dtype) for _, policy in _policies(engine.model, engine._policy())]
    assert blocks == [(torch.bfloat16, torch.float32)] * len(engine.model.blocks) and rest == (torch.float32, torch.float32)


@pytest.mark.usefixtures("one_rank")
def test_its_layers_know_that_their_weights_are_gathered_and_it_warns_of_nothing():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine = engine_in("bf16")
        engine.attempt(0, [random_batch(0)])
    assert all(layer.gathered for block in engine.model.blocks for layer in (block.mlp.gate, block.mlp.up, block.mlp.down))
    assert not [warning for warning in said if "FSDP2-wrapped" in str(warning.message)]


def test_a_sharding_group_holds_one_replica(monkeypatch):
    """Four ranks, two per replica, and five rows of three."""
    owned = []
    for rank in range(4):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist, "world", lambda: 4)
        owned.append(owned_range(torch.Size([5, 3]), 2))
    assert owned == [(0, 9), (9, 15), (0, 9), (9, 15)]


@pytest.mark.parametrize("shared", [1, 2])
def test_replicated_shards_are_written_once_and_completely(shared):
    """``shared`` neighbouring ranks of four hold one replica, so 4 or 2 ranks hold the same shard."""
    written, sizes = defaultdict(list), {}
    for rank in range(4):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            engine = engine_of(f"train.shard_ranks={shared}", "model.width=16", "model.heads=2")
            sizes = {name: shape.numel() for name, shape in engine.shapes.items()}
            owned = state_vectors(engine, EMA([shard.master for shard in engine.shards()], 0.9))
            for key, start, tensor in parts_of(owned, engine):
                written[key].append((start, start + tensor.numel()))
        finally:
            torch.distributed.destroy_process_group()
    assert len(written) == 4 * len(sizes)  # weights, EMA, two moments
    for key, parts in written.items():
        starts, stops = zip(*sorted(parts), strict=True)
        assert (*starts, sizes[key.split("/")[1]]) == (0, *stops), key


def test_with_replicas_a_rank_reads_the_one_file_that_it_wrote(tmp_path, monkeypatch):
    """64 ranks, 8 of which share a replica. Each writes and reads an eighth of what it owns, not files of all replicas."""
    world, ranks, shapes = 64, 8, {"a.weight": [70, 3], "b.bias": [5]}
    engine = SimpleNamespace(replicas=world // ranks)
    engine.own_part = lambda elements: Engine.own_part(engine, elements)
    monkeypatch.setattr(dist, "world", lambda: world)
    values = {name: torch.randn(shape) for name, shape in shapes.items()}

    def parts(rank: int) -> list:
        monkeypatch.setattr(dist, "rank", lambda: rank)
        spans = {name: owned_range(value.shape, ranks) for name, value in values.items()}
        owned = [(f"model/{name}", start, values[name].view(-1)[start:stop]) for name, (start, stop) in spans.items()]
        return parts_of(owned, engine)

    files = {
        file_name(rank): write_file(tmp_path / file_name(rank), [Range(*part) for part in parts(rank)]) for rank in range(world)
    }
    checkpoint = Checkpoint(tmp_path, SimpleNamespace(kinds=("model",), shapes=shapes, files=files))
    seen, read = [], 0
    monkeypatch.setattr(vectors, "read_header", lambda path: seen.append(path.name) or read_header(path))
    for rank in range(world):
        spans = {key: (start, start + tensor.numel()) for key, start, tensor in parts(rank)}
        seen.clear()
        with vectors.open_ranges(checkpoint, spans, rank, world) as reader:
            for key, start, tensor in parts(rank):
                reader.read(key, start, out := torch.empty(tensor.shape))
                assert torch.equal(out, tensor)
            read += reader.bytes_read
        assert seen == [file_name(rank)] or not spans
    assert read == 4 * (70 * 3 + 5)
