"""Memory of a rank by part: rules, numbers computed by hand, and measurements on an H200."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.conftest import digits_config
from tests.unit.memory_configs import CPU, CUDA, GRID, REDUCED_B, config_of
from xar_scale.bench.record import read_record
from xar_scale.config import Config, merge
from xar_scale.memory import rank
from xar_scale.memory.passes import PassMemory, pass_estimator
from xar_scale.memory.rank import rank_memory, weights_of
from xar_scale.presets import model_values, recipe

RECORDS = Path(__file__).parents[2] / "docs" / "benchmarks" / "records"


@pytest.mark.parametrize("name", ["step-bf16", "step-bf16-64", "step-fsdp2-64"])
def test_the_estimate_of_a_compiled_step_matches_an_h200(name):
    """xar_h, with 1.19 billion weights."""
    record = read_record(RECORDS / f"2026-11-27-h200-{name}.json")
    settings = record.settings
    assert settings["compile"] and settings["recompute"] == "none"
    model = {**model_values(settings["model"]), "dropout": settings["dropout"]}
    train = {"global_batch": settings["batch"], "engine": settings["engine"], "precision": settings["precision"]}
    changes = {"model": model, "train": train, "kernels": {"compile": True}, "data": {"lanes": 1}}
    config = Config.from_dict(merge(recipe("imagenet256_h"), changes))
    needed = rank_memory(config, settings["precision"], settings["batch"], 1, CUDA, pass_estimator())
    assert sum(needed) / 1e9 == pytest.approx(record.memory_gb, rel=0.02)


@pytest.mark.parametrize(
    ("saved", "peak", "gone", "unreduced"),
    [(400, 410, 0, 0), (0.4, 5.4, 0.1, 1), (0.4, 0.9, 0.7, 2)],
    ids=["before any block's gradients", "with one block's", "with two"],
)
def test_under_fsdp2_a_block_s_gradients_replace_its_activations(saved, peak, gone, unreduced):
    """Sizes are in units of a block's gradients; a block saves saved / 4."""
    config = config_of("train.engine=fsdp2", "train.global_batch=512", "train.micro_batch=1", *GRID)
    weights = weights_of(config.model)
    one = 4 * rank.padded(weights.block_shapes, "fsdp2", 512)
    assert weights.blocks == 4
    stub = PassMemory(round(saved * one), 0, round(peak * one))
    needed = rank_memory(config, "tf32", 1, 512, CUDA, estimate_pass=lambda *_: stub)
    assert needed.unreduced == unreduced * one
    assert needed.activations == pytest.approx((peak - gone) * one)


def test_gradients_replace_activations_if_a_step_is_one_micro_batch():
    one, two = (
        rank_memory(config_of(f"train.global_batch={size}", "train.micro_batch=64", *GRID), "tf32", 64, 1, CPU)
        for size in (64, 128)
    )
    assert (one.gradients, two.gradients) == (0, 4 * weights_of(config_of(*GRID).model).total)
    assert one.activations == two.activations > 0


@pytest.mark.parametrize("engine", ["single", "fsdp2", "ddp", "deepspeed"])
def test_a_split_micro_batch_keeps_the_gradients_of_earlier_parts(engine):
    """As after the guard's fallback."""
    whole, parts = (
        config_of(f"train.engine={engine}", "train.global_batch=64", f"train.micro_batch={size}", *GRID) for size in (64, 32)
    )
    assert rank_memory(whole, "tf32", 32, 1, CPU) == rank_memory(parts, "tf32", 32, 1, CPU)


def test_the_hpz_copy_is_counted_once():
    """Master weights stay sharded over all ranks, and each rank keeps its part of the group's copy."""
    plain = digits_config("train.engine=deepspeed", "train.global_batch=128", "train.micro_batch=8", *GRID)
    shared = dataclasses.replace(plain, train=dataclasses.replace(plain.train, shard_ranks=4))
    weights = weights_of(plain.model).total
    more = rank_memory(shared, "tf32", 8, 16, CPU).parameters - rank_memory(plain, "tf32", 8, 16, CPU).parameters
    assert more == pytest.approx(4 * weights / 4, rel=1e-3)


def test_a_rank_needs_less_among_more_ranks():
    config = digits_config("train.engine=fsdp2", "train.global_batch=256", "train.micro_batch=8", *REDUCED_B)
    needs = [rank_memory(config, "tf32", 8, world, CPU) for world in (1, 2, 16)]
    states = [sum(need[:4]) for need in needs]  # master weights, moments, EMA, gradients
    assert states == sorted(set(states), reverse=True)
    copies = dataclasses.replace(config, train=dataclasses.replace(config.train, shard_ranks=2))
    assert rank_memory(copies, "tf32", 8, 16, CPU) == needs[1]
    weights = weights_of(config.model)
    assert states[0] == 20 * weights.total and states[1] == 20 * weights.padded_total("fsdp2", 2) / 2


SMALL = rank.Weights((torch.Size([8, 4]),), 3, (torch.Size([100, 4]),))  # 496: 124 per rank of four
WIDE = rank.Weights((torch.Size([800_000_000]),), 3, ())


@pytest.mark.parametrize(
    ("weights", "words", "needed"),
    [
        # The peak is at the end, with the float32 gradients of parameters outside blocks
        (SMALL, "train.engine=fsdp2", (496, 992, 496, 496, 4 * 400 + 2 * 2 * 32, 4 * 400, 30, 0)),
        (SMALL, "train.engine=fsdp2 optim.ema_snapshots_every=9", (496, 992, 3 * 496, 496, 1728, 1600, 30, 0)),
        # A bucket of ten in bf16 and one in float32, and the largest gradient; gradients are kept even with one micro-batch
        (SMALL, "train.engine=deepspeed", (992, 992, 496, 496, 4 * 496, 10 * (2 + 4) + 4 * 400, 330, 0)),
        # Two blocks, as these are more than ZeRO-3 keeps gathered: 0.6e9 weights per rank, in GB
        (WIDE, "train.engine=deepspeed", (4.8e9, 4.8e9, 2.4e9, 2.4e9, 6.4e9, 60 + 3.2e9, 330, 0)),
        # All weights and all accumulated gradients, a shard of the rest
        (SMALL, "train.engine=ddp", (4 * 496, 992, 496, 4 * 496, 0, 0, 330, 0)),
    ],
    ids=["fsdp2", "EMA snapshots", "ZeRO-3", "ZeRO-3 with wide blocks", "ddp"],
)
def test_each_part_of_a_rank_s_memory(weights, words, needed, monkeypatch):
    monkeypatch.setattr(rank, "weights_of", lambda _: weights)
    config = digits_config("train.global_batch=8", "train.micro_batch=2", "train.precision=bf16", *words.split())
    found = rank_memory(config, "bf16", 2, 4, CUDA, lambda *_: PassMemory(300, 310, 330), bucket=10)
    assert tuple(found) == needed and found.total == pytest.approx(1.1 * sum(needed))
