"""The plan's formulas, order and text against numbers computed by hand for weights and machines of round sizes."""

import dataclasses
import re

import pytest
import torch

from tests.unit.plans import FEW, H100, config
from xar_scale.errors import ConfigError
from xar_scale.memory.passes import PassMemory
from xar_scale.memory.rank import RankMemory, Weights, weights_of
from xar_scale.plan import cost, text
from xar_scale.plan.hardware import GPU, Machines
from xar_scale.plan.search import Candidate, Search, _sort_key, search

ROUND = GPU(1e12, 1e12, 1e12, 1e12, memory_bandwidth=650.0, nvlink=1000.0, host_link=100.0, network=10.0)
TWO_NODES = Machines(ROUND, 8, 4, launch=0.5, link_share=0.5, hop=0.4, disk=40.0, loader=2.0)
NEAR, FAR, OWN = cost.Link(500.0, 0.04), cost.Link(20.0, 0.13), cost.Link(5.0, 0.4)
SMALL = Weights((torch.Size([8, 4]),), 3, (torch.Size([4]),))  # 100, which four ranks shard without padding
LARGE = Weights((torch.Size([250_000_000]),), 8, ())  # ZeRO-3 keeps a quarter gathered for the backward pass
TWO_MICRO_BATCHES = (
    "train.global_batch=16",
    "data.lanes=16",
    "train.micro_batch=1",
    "train.recompute=offload",
    "data.workers=4",
)
GROUPS = config("train.engine=fsdp2", "train.shard_ranks=4", *TWO_MICRO_BATCHES)
ZERO3 = config("train.engine=deepspeed", *TWO_MICRO_BATCHES)
DDP = config("train.engine=ddp", *TWO_MICRO_BATCHES)
IN_GROUPS = [
    cost.Collective(
        "all-gather forward", 2 * (192 + 16), 4, 8, NEAR, exposed_calls=1
    ),  # three blocks in bf16, the rest in float32
    cost.Collective("all-gather backward", 2 * 192, 4, 6, NEAR),
    cost.Collective("reduce-scatter", 2 * 400, 4, 8, NEAR, exposed_calls=1),
    cost.Collective("all-reduce replicas", 200, 2, 8, OWN, rounds=2, exposed_calls=1),
]


def test_in_a_ring_between_nodes_one_hop_in_per_node_leaves_the_node():
    assert cost.link_of(TWO_NODES, 4) == NEAR and cost.link_of(TWO_NODES, 8) == FAR


def test_each_collective_has_its_calls_and_its_link():
    assert cost.step_collectives(GROUPS, SMALL, TWO_NODES) == IN_GROUPS
    in_one = cost.step_collectives(GROUPS, SMALL, TWO_NODES._replace(per_node=8))
    assert in_one[3] == IN_GROUPS[3]._replace(link=NEAR)  # replicas within a node use NVLink
    assert cost.step_collectives(ZERO3, LARGE, TWO_NODES) == [
        cost.Collective("all-gather forward", 8e9, 8, 18, FAR, exposed_calls=1),
        cost.Collective("all-gather backward", 6e9, 8, 14, FAR),
        cost.Collective("reduce-scatter", 8e9, 8, 18, FAR, exposed_calls=1),
    ]
    # once a step, however many micro-batches it has; 100 weights, padded to 104
    assert cost.step_collectives(DDP, SMALL, TWO_NODES) == [
        cost.Collective("reduce-scatter", 416, 8, 1, FAR, exposed_calls=1),
        cost.Collective("all-gather", 416, 8, 1, FAR, exposed_calls=1),
    ]


def test_ddp_communication_is_exposed():
    time = cost.step_time(DDP, SMALL, TWO_NODES, cost.step_collectives(DDP, SMALL, TWO_NODES))
    assert time.exposed == time.communication == pytest.approx(2 * (416 * 7 / 8 / 20 + 7 * 0.13))


def test_each_part_of_a_step_has_its_seconds():
    time = cost.step_time(GROUPS, SMALL, TWO_NODES, IN_GROUPS)
    first, last = (416 * 3 / 4 / 500 + 8 * 3 * 0.04) / 8, (800 * 3 / 4 / 500 + 8 * 3 * 0.04) / 8
    across = 2 * (200 / 2 / 5 + 8 * 0.4) / 8  # the last gradients are reduced in the group, then over its replicas
    assert time.exposed == pytest.approx(first + last + across) == pytest.approx(0.198 + 0.27 + 5.8)
    assert time.communication == pytest.approx(1.584 + 1.296 + 2.16 + 46.4)
    assert time.offload == pytest.approx(2 * 2 * 3 * 256 * 128 * 4 / 100)  # there and back, two micro-batches of one sample
    assert time.launches == 2 * 3 * 0.5 * 1.5  # recomputation launches more
    assert time.optimizer == pytest.approx(14 * 4 * 100 / 4 / 650)
    assert time.data == 16 / (2 * 4 * 8)


def test_an_optimizer_reads_and_writes_14_numbers_per_weight_16_under_zero3_and_gradients_under_ddp():
    assert cost.optimizer_bytes(GROUPS, SMALL, 8) == 14 * 4 * 25
    assert cost.optimizer_bytes(ZERO3, SMALL, 8) == 16 * 4 * 13  # 100 weights, padded to 104
    # and all gradients of two micro-batches, copied into the reduced vector
    assert cost.optimizer_bytes(DDP, SMALL, 8) == 16 * 4 * 13 + (2 + 3) * 4 * 100


def test_each_rank_copies_and_each_node_writes_its_part_of_a_checkpoint():
    assert cost.checkpoint(GROUPS, SMALL, TWO_NODES) == cost.Checkpoint(1600, copy=1600 / 8 / 100, write=1600 / (40 * 2))


def test_a_sample_is_two_float16_of_each_latent_value_and_a_tar_s_headers():
    assert cost.sample_bytes(GROUPS) == 2 * 2 * 16 * 16 * 16 + 2048


SHORT = ("train.steps=7200", "optim.warmup_steps=0")


def candidate(seconds: float, recompute: str, engine: str, micro: int, compiled: str = "false") -> Candidate:
    kernels = f"kernels.compile={compiled}"
    shape = config(*SHORT, f"train.recompute={recompute}", f"train.engine={engine}", f"train.micro_batch={micro}", kernels)
    return Candidate(shape, [], cost.StepTime(seconds, 0, 0, 0, 0, 0, 0))


def test_the_fastest_is_first_then_the_least_recomputation_then_compiled_then_by_engine_then_the_largest_micro_batch():
    candidates = [
        candidate(1.0, "offload", "fsdp2", 1),
        candidate(2.01, "none", "fsdp2", 2, "true"),
        candidate(2.0, "none", "ddp", 4),
        candidate(2.0, "none", "deepspeed", 8),
        candidate(2.01, "none", "deepspeed", 4),  # equal within the tolerance
        candidate(2.0, "none", "fsdp2", 16),
        candidate(2.0, "selective", "deepspeed", 32),
        candidate(2.0, "full", "deepspeed", 64),
        candidate(2.0, "offload", "deepspeed", 128),
        candidate(2.1, "none", "deepspeed", 8),
    ]
    found = [*reversed(candidates)]
    found.sort(key=_sort_key)
    assert found == candidates


def test_what_does_not_fit_after_a_fallback_is_not_planned(monkeypatch):
    def memory(_config, mode, *_):
        return RankMemory(90e9 if mode == "tf32" else 1e9, 0, 0, 0)

    for module in ("plan.search", "memory.fallback"):
        monkeypatch.setattr(f"xar_scale.{module}.rank_memory", memory)
    words = [*FEW, "train.engine=fsdp2", "train.recompute=none", "train.micro_batch=4"]
    fixed = [word.partition("=")[0] for word in words]
    with pytest.raises(ConfigError, match="no candidate fits in 80 GB per GPU on 2 GPUs: the smallest needs 99 GB"):
        _ = search(config(*words), H100._replace(gpus=2), fixed).best
    assert search(config(*words, "guard.enabled=false"), H100._replace(gpus=2), fixed).best.parts == 1


def test_a_plan_s_text_has_its_numbers(monkeypatch):
    """7200 steps of half a second on 16 GPUs."""
    monkeypatch.setattr("xar_scale.plan.search.rank_memory", lambda *_: RankMemory(40e9 / 1.1, 0, 0, 0))
    shape = config(*SHORT)
    candidates = [
        candidate(0.5, "none", "fsdp2", 128),
        candidate(0.6, "full", "fsdp2", 128),
        candidate(0.75, "none", "deepspeed", 64),
    ]

    def said(*candidates: Candidate) -> list[str]:
        chosen = Search(shape, H100, frozenset(), weights_of(shape.model), lambda *_: PassMemory(0, 0, 0), [*candidates])
        return [re.sub(" +", " ", line) for line in text.describe(chosen, "nano", "h100").splitlines()]

    lines, size = said(*candidates), 16 * weights_of(shape.model).total
    assert {
        "images/s 4,096 (256.0 per GPU)",
        "whole run 1.0 hours, 16 GPU-hours",
        "data per node 2,048 samples/s, 37.7 MB/s",
        "runner-up: ZeRO-3, recompute none, micro-batch 64: 750.0 ms per step, 40.0 GB",
    } <= {*lines}
    assert any(line.startswith(f"checkpoint {size / 1e9:,.1f} GB: ") for line in lines)
    assert "runner-up: FSDP2, recompute full, micro-batch 128: 600.0 ms per step, 40.0 GB" in said(*candidates[:2])
    assert not any(line.startswith("runner-up") for line in said(candidates[0]))
    assert not any("tied" in line for line in lines)
    quick = candidate(0.5, "none", "ddp", 128), candidate(0.501, "none", "deepspeed", 128), candidate(0.9, "none", "fsdp2", 128)
    reason = " tied within 2% with 1 other (memory not checked); tie-breakers: least recomputation, DDP, largest micro-batch"
    assert reason in said(*quick)
    assert {
        "communication (exposed) 0.00 ms: all of it",
        " overlap: no communication overlaps with compute; no rank waits for a slower one",
    } <= {*said(dataclasses.replace(quick[0], collectives=cost.step_collectives(quick[0].config, SMALL, H100)))}
    large = RankMemory(90e9, 0, 0, 0)  # does not fit, so it is not among the choices
    monkeypatch.setattr(
        "xar_scale.plan.search.rank_memory",
        lambda config, *_: large if config.train.engine == "ddp" else RankMemory(1, 0, 0, 0),
    )
    assert not any("tied" in line for line in said(*quick))
