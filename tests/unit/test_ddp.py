"""DDP in one process, and as one rank of four: steps as in plain PyTorch, memory layout, and ownership."""

import math
import weakref
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.conftest import digits_config, random_batch
from tests.unit.tiny_engine import engine_of, losses, state, take_over
from xar_scale import dist
from xar_scale.config import Config
from xar_scale.engines import Engine, replicated
from xar_scale.errors import ConfigError

ddp = partial(engine_of, "train.engine=ddp", "train.precision=fp32")
plain = partial(engine_of, "train.engine=single", "train.precision=fp32")
TWO_PASSES = ("train.global_batch=16", "train.micro_batch=8")


def passes(step: int) -> list:
    return [random_batch(2 * step), random_batch(2 * step + 1)]


@pytest.fixture
def four_ranks():
    """Collectives in a fake process group."""

    def of_rank(rank: int) -> None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)

    yield of_rank
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def assert_same(one: Engine, other: Engine) -> None:
    assert all(torch.equal(mine, its) for mine, its in zip(state(one), state(other), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_steps_match_plain_pytorch(precision):
    """Bitwise where nothing is clipped: the norm is summed in another order."""
    one, other = (engine(f"train.precision={precision}", "optim.clip=1e9") for engine in (ddp, plain))
    assert losses(one, 0, 1, 2) == losses(other, 0, 1, 2)
    assert_same(one, other)


def test_micro_batches_accumulate_and_discarded_ones_do_not():
    one, other = ddp(*TWO_PASSES, "optim.clip=1e9"), plain(*TWO_PASSES, "optim.clip=1e9")
    one.attempt(0, passes(7))
    one.discard()
    for step in range(3):
        found, expected = (engine.attempt(step, passes(step)) for engine in (one, other))
        assert (found.loss, found.grad_norm) == (expected.loss, pytest.approx(expected.grad_norm, rel=1e-5))
        for engine, verdict in ((one, found), (other, expected)):
            engine.step(1e-2, verdict)
    assert_same(one, other)


def test_gradients_are_clipped():
    clipped, engine = ddp("optim.clip=0.5"), ddp("optim.clip=1e9")
    verdicts = [each.attempt(0, [random_batch(0)]) for each in (clipped, engine)]
    assert verdicts[0].grad_norm > 0.5
    for each, verdict in zip((clipped, engine), verdicts, strict=True):
        each.step(0.0, verdict)
    expected = engine._gradients * (0.5 / verdicts[0].grad_norm)
    torch.testing.assert_close(clipped._gradients, expected, rtol=1e-5, atol=0)


def test_parts_of_a_micro_batch_accumulate():
    one, other = ddp(), ddp()
    other.set_precision("fp32", splits=4)
    found, expected = (engine.attempt(0, [random_batch(0)]) for engine in (other, one))
    assert (found.loss, found.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-5)


def test_training_continues_from_what_is_written_to_its_shards():
    trained, engine = ddp(), ddp()
    losses(trained, 0, 1, 2)
    take_over(engine, trained, 3)
    assert losses(engine, 3) == losses(trained, 3)
    assert_same(engine, trained)


def test_a_micro_batch_leaves_gradients_only_in_the_vector():
    engine = ddp()
    for step in range(2):
        engine.attempt(step, [random_batch(step)])
        assert all(parameter.grad is None for parameter in engine.parameters.values())
        (gradient,) = engine.gradients()
        assert gradient.data_ptr() == engine._gradients.data_ptr() and gradient.norm() > 0
        engine.discard()
        assert engine.gradients() == []


def test_tensors_are_aligned_for_rows_of_16_bytes():
    engine = ddp("model.width=20", "model.heads=1", "model.mlp_ratio=1.65")  # gives 33 channels
    first, sizes = engine._weights.data_ptr(), {shape.numel() % 64 for shape in engine.shapes.values()}
    assert len(sizes) > 1 and {(weight.data_ptr() - first) % 256 for weight in engine.parameters.values()} == {0}


def test_four_ranks_own_equal_parts_of_everything_once(four_ranks):
    owned, sizes = {}, {}
    for rank in range(4):
        four_ranks(rank)
        engine = ddp("model.width=16", "model.heads=2", "model.mlp_ratio=1.65")
        for shard in engine.shards():
            assert shard.master.numel() == shard.exp_avg.numel() == shard.exp_avg_sq.numel() == shard.stop - shard.start
            whole_one = engine.parameters[shard.name].detach().view(-1)
            assert shard.master.numel() == 0 or shard.master.data_ptr() == whole_one[shard.start :].data_ptr()
            owned.setdefault(shard.name, []).append((shard.start, shard.stop))
        sizes = {name: math.prod(shape) for name, shape in engine.shapes.items()}
        assert engine.owned.start % 64 == 0 and all(
            part.numel() for group in engine.optimizer.param_groups for part in group["params"]
        )
        assert engine.owned == slice(rank * len(engine._weights) // 4, (rank + 1) * len(engine._weights) // 4)
        torch.distributed.destroy_process_group()
    assert {name: sum(stop - start for start, stop in parts) for name, parts in owned.items()} == sizes
    for parts in owned.values():
        held = [part for part in parts if part[0] < part[1]]
        assert held == sorted(held) and all(one[1] == other[0] for one, other in pairwise(held))


def test_a_step_of_two_micro_batches_reduces_once_and_gathers_once(four_ranks, monkeypatch):
    """So does the start, so that NCCL has its buffers and all ranks have the same weights."""
    four_ranks(1)
    sent = []
    for name in ("reduce_scatter", "all_gather"):
        kept = getattr(dist, name)
        noted = partial(
            lambda name, kept, out, given: (sent.append((name, len(out), len(given))), kept(out, given)), name, kept
        )
        monkeypatch.setattr(dist, name, noted)
    engine = ddp("model.width=16", "model.heads=2", "train.global_batch=64", "train.micro_batch=8")
    length = len(engine._weights)
    reduced, gathered = ("reduce_scatter", length // 4, length), ("all_gather", length, length // 4)
    assert sent == [reduced, gathered]
    for batch in passes(0):
        engine.forward_backward(batch)
    assert sent == [reduced, gathered]
    verdict = engine.agree(torch.zeros(()), torch.zeros(()))
    assert sent == [reduced, gathered, reduced]
    engine.step(1e-3, verdict)
    assert sent == [reduced, gathered, reduced, gathered]


def test_a_rank_that_owns_only_padding_takes_steps():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=255, world_size=256)
    try:
        engine = ddp("model.width=16", "model.heads=2", "train.global_batch=256", "data.lanes=256")
        assert not any(part.numel() for part in engine.local.values())
        assert losses(engine, 0)[0] > 0
    finally:
        torch.distributed.destroy_process_group()


def test_an_engine_is_freed_with_its_last_reference():
    engine = ddp()
    losses(engine, 0)
    gone = weakref.ref(engine)
    del engine
    assert gone() is None


class ReplayedOnCpu(replicated.Graphs):
    """Emulates replays on a CPU: the device's work is repeated, and the host's state stays as at the capture."""

    def __init__(self, engine):
        self.engine, self.captured, self.done = engine, {}, {}

    def has_captured(self, kind, *inputs):
        return kind in self.captured

    def run(self, kind, work, *inputs, warm_up):
        self.done[kind] = self.done.get(kind, 0) + 1
        if self.done[kind] <= warm_up:
            return work(*inputs)
        added, kept = self.engine._added, frozenset(self.engine._added)
        self._become(added, self.captured.setdefault(kind, kept))
        outputs = work(*inputs)
        self._become(added, kept)
        return outputs

    @staticmethod
    def _become(names, others):
        names.clear()
        names.update(others)


def test_replayed_micro_batches_train_like_eager_ones():
    replayed, other = ddp(*TWO_PASSES), ddp(*TWO_PASSES)
    replayed._graphs = ReplayedOnCpu(replayed)
    for step in range(5):
        found, expected = (engine.attempt(step, passes(step)) for engine in (replayed, other))
        assert found == expected
        if step == 3:  # attempted and discarded
            for engine in (replayed, other):
                engine.discard()
            continue
        for engine in (replayed, other):
            engine.step(1e-2, expected)
    assert replayed._graphs.captured.keys() == {replicated.FIRST, replicated.ADDED}
    assert_same(replayed, other)
    replayed.shards_written(4)
    assert replayed._graphs is None  # as on a GPU, where the graphs are dropped


def test_it_has_no_sharding_groups():
    with pytest.raises(ConfigError, match="train.engine=ddp replicates all weights"):
        digits_config("train.engine=ddp", "train.shard_ranks=1")
    assert isinstance(digits_config("train.engine=ddp"), Config)
