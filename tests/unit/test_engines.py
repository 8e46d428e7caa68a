"""Engines in one process: the verdict, a discarded step, shards as views."""

import math

import pytest
import torch

from tests.conftest import digits_config, random_batch
from xar_scale import dist
from xar_scale.engines import create_engine
from xar_scale.engines.base import set_steps, sum_of_squares
from xar_scale.errors import ConfigError
from xar_scale.guard import Bad
from xar_scale.model.xar import initial_weights, meta_model

CPU = torch.device("cpu")


def single_engine(*overrides: str):
    config = digits_config("train.engine=single", *overrides)
    model = meta_model(config.model)
    return create_engine(model, initial_weights(model, seed=0), config, CPU)


def one_step(engine, step: int, batch=None) -> float:
    verdict = engine.attempt(step, [batch or random_batch(step)])
    engine.step(1e-3, verdict)
    return verdict.loss


def copies(engine) -> list[torch.Tensor]:
    return [tensor.clone() for shard in engine.shards() for tensor in (shard.master, shard.exp_avg, shard.exp_avg_sq)]


def test_single_refuses_more_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, not 2"):
        single_engine()


def test_shards_are_views_of_weights_and_moments():
    engine = single_engine()
    one_step(engine, 0)
    parameters = dict(engine.network.named_parameters())
    for shard in engine.shards():
        assert (shard.start, shard.stop) == (0, parameters[shard.name].numel())
        assert shard.master.data_ptr() == parameters[shard.name].data_ptr()
        assert shard.exp_avg.abs().sum() > 0 and shard.exp_avg_sq.abs().sum() > 0
    assert [shard.name for shard in engine.shards()] == list(parameters)


def test_step_counts_are_set_per_tensor_and_per_group():
    """torch's Adam counts steps per tensor, apex's per group."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    set_steps(optimizer, weight, 7)
    assert optimizer.state[weight]["step"] == 7 and optimizer.param_groups[0]["step"] == 7


def test_the_agreed_norm_is_clipped():
    engine = single_engine("optim.clip=0.01")
    verdict = engine.agree(engine.forward_backward(random_batch(0)), torch.zeros(()))
    norm = torch.cat([gradient.flatten() for gradient in engine.gradients()]).double().norm()
    torch.testing.assert_close(torch.tensor(verdict.grad_norm, dtype=torch.float64), norm, rtol=1e-6, atol=0)
    assert norm > 0.01
    taken = []
    engine._optimizer_step = lambda: taken.extend(gradient.clone() for gradient in engine.gradients())
    engine.step(1e-3, verdict)
    torch.testing.assert_close(
        torch.cat([gradient.flatten() for gradient in taken]).norm(), torch.tensor(0.01), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_batch_is_detected_and_discarding_it_leaves_no_trace(value):
    undisturbed, engine = single_engine(), single_engine()
    for step in range(3):
        bad = random_batch(100)
        bad.latents[1, 0, 0, 0] = value
        before = copies(engine)
        verdict = engine.agree(engine.forward_backward(bad), torch.zeros(()))
        assert verdict.bad & Bad.LOSS and verdict.bad & Bad.GRADIENT
        engine.discard()
        assert all(torch.equal(was, now) for was, now in zip(before, copies(engine), strict=True))
        assert one_step(engine, step) == one_step(undisturbed, step)
    assert all(torch.equal(a, b) for a, b in zip(copies(engine), copies(undisturbed), strict=True))


def test_a_finite_loss_with_a_non_finite_gradient_is_detected():
    engine = single_engine()
    loss = engine.forward_backward(random_batch(0))
    engine.gradients()[3].view(-1)[0] = float("nan")
    verdict = engine.agree(loss, torch.zeros(()))
    assert math.isfinite(verdict.loss)
    assert verdict.bad == Bad.GRADIENT


@pytest.mark.parametrize("at", [0, 1])
def test_a_non_finite_input_is_detected_in_any_micro_batch(at):
    batches = [random_batch(number) for number in range(2)]
    batches[at].noise[3, 2, 1] = float("nan")
    assert Bad.INPUT in single_engine().attempt(0, batches).bad


def test_a_gradient_that_overflows_only_in_the_sum_over_ranks_is_detected(monkeypatch):
    engine = single_engine()
    loss = engine.forward_backward(random_batch(0))
    engine.gradients()[3].view(-1)[0] = 1.5e19  # its square is below float32's maximum, 3.4e38, and four times that above
    monkeypatch.setattr(dist, "all_reduce_sum", lambda tensor: 4 * tensor)
    assert engine.agree(loss, torch.zeros(())).bad == Bad.GRADIENT and engine.local_bad == Bad.NOTHING


def test_accumulated_micro_batches_equal_one_batch():
    together, apart = single_engine(), single_engine("train.micro_batch=32")
    whole = random_batch(0, size=128)
    loss = together.forward_backward(whole)
    parts = [apart.forward_backward(part) for part in whole.split(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss)
    for one, other in zip(apart.gradients(), together.gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_dropout_follows_seed_step_and_rank_only():
    engine = single_engine("model.dropout=0.2")

    def loss(step):
        return engine.attempt(step, [random_batch(0)]).loss

    first = loss(1)
    torch.rand(7)
    assert loss(1) == first
    assert loss(2) != first
    engine.rank = 1
    assert loss(1) != first


def test_bf16_computes_in_bf16_over_float32_weights():
    exact, mixed = single_engine(), single_engine("train.precision=bf16")
    assert {shard.master.dtype for shard in mixed.shards()} == {torch.float32}
    a, b = one_step(exact, 0), one_step(mixed, 0)
    assert a != b
    assert a == pytest.approx(b, rel=1e-2)


def test_precision_sets_the_matmul_mode():
    try:
        for mode, expected in (("tf32", "high"), ("fp32", "highest")):
            single_engine(f"train.precision={mode}")
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


def test_squares_of_many_numbers_are_summed_exactly():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(size, generator=generator) for size in (3_000_001, (700, 4096), 7, 0)]
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    assert sum_of_squares(tensors).item() == pytest.approx(exact.item(), rel=1e-6)
