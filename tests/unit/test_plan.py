"""The plan: its formulas, its choice, what it prints and writes; its memory against real steps and 512 simulated ranks."""

import dataclasses
import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch

from tests.processes import ROOT
from tests.unit.conftest import assert_ends
from tests.unit.plans import FEW, H100, config
from xar_scale.cli import main
from xar_scale.config import Config, read_yaml
from xar_scale.engines.deepspeed.settings import deepspeed_settings
from xar_scale.memory.rank import WEIGHT, padded, rank_memory, weights_of
from xar_scale.model.flops import forward_flops, training_flops
from xar_scale.model.xar import meta_model
from xar_scale.plan import cost, text
from xar_scale.plan.hardware import GPUS, Machines
from xar_scale.plan.search import RECOMPUTE, Search, search

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


def time_of(config: Config, machines: Machines = H100) -> cost.StepTime:
    weights = weights_of(config.model)
    return cost.step_time(config, weights, machines, cost.step_collectives(config, weights, machines))


@cache
def found(model: str, gpus: int, gpu: str, *overrides: str, **machines: float) -> Search:
    fixed = [word.partition("=")[0] for word in overrides]
    searched = config("train.engine=fsdp2", *overrides, model=model)
    return search(searched, Machines(GPUS[gpu], gpus, 8)._replace(**machines), fixed)


def test_weights_are_counted():
    assert weights_of(config(model="xar_b").model).total == sum(
        p.numel() for p in meta_model(config(model="xar_b").model).parameters()
    )


@pytest.mark.parametrize(
    ("engine", "shared", "gathered", "reduced"),
    [("fsdp2", None, 2, 4), ("deepspeed", None, 2, 2), ("fsdp2", 8, 2, 4), ("deepspeed", 8, 2, 2)],
)
def test_each_byte_is_sent_once_around_a_ring(engine, shared, gathered, reduced):
    shape = config(
        f"train.engine={engine}", f"train.shard_ranks={shared or 'null'}", "train.micro_batch=128"
    )  # one micro-batch
    weights = weights_of(shape.model)
    sent = {each.name: each.bytes_sent for each in cost.step_collectives(shape, weights, H100)}
    far, near, whole = 15 / 16, 7 / 8 if shared else 15 / 16, weights.padded_total(engine, shared or 16)
    assert engine == "fsdp2" or whole == pytest.approx(weights.total, rel=1e-3)
    if engine == "deepspeed":
        assert sent["all-gather forward"] == pytest.approx(gathered * whole * far)
        assert sent["reduce-scatter"] == pytest.approx(reduced * whole * far)
        assert {*sent} == {"all-gather forward", "reduce-scatter"}  # a network this small stays gathered
    else:
        root = whole - weights.blocks * padded(weights.block_shapes, engine, shared or 16)  # in float32, and kept gathered
        assert sent["all-gather forward"] == pytest.approx((gathered * (whole - root) + 4 * root) * near)
        assert sent["all-gather backward"] == pytest.approx(gathered * (whole - root) * near)
        assert sent["reduce-scatter"] == pytest.approx(reduced * whole * near)
        assert sent.get("all-reduce replicas") == (pytest.approx(2 * reduced * whole / 8 / 2) if shared else None)


@pytest.mark.parametrize(("shared", "near"), [(None, 15 / 16), (8, 7 / 8)])
def test_zero3_gathers_again_what_it_does_not_keep_and_hpz_gathers_within_the_group(shared, near):
    """A step of two micro-batches."""
    words = ["train.engine=deepspeed", f"train.shard_ranks={shared or 'null'}", "train.micro_batch=64"]
    shape = config(*words, model="xar_h")
    weights = weights_of(shape.model)
    sent = {each.name: each for each in cost.step_collectives(shape, weights, H100)}
    whole, again = 2 * weights.padded_total("deepspeed", shared or 16), 1 - 0.5e9 / weights.total
    forward = sent["all-gather forward"].bytes_sent + (sent["all-gather forward, in group"].bytes_sent if shared else 0)
    assert forward == pytest.approx((1 + (near * 16 / 15 if shared else 1)) * whole * 15 / 16)
    assert sent["all-gather backward"].bytes_sent == pytest.approx(2 * whole * again * near)
    assert sent["reduce-scatter"].bytes_sent == pytest.approx(2 * whole * 15 / 16)
    calls = weights.blocks + 1
    assert [each.calls for name, each in sent.items() if "forward" in name] == ([calls, calls] if shared else [2 * calls])


def test_between_nodes_a_ring_is_as_fast_as_all_adapters_of_a_node():
    near, far = cost.link_of(H100, 8), cost.link_of(H100, 16)
    assert near.bandwidth == 0.7 * 450e9 and far.bandwidth == 0.7 * 8 * 50e9
    slow = H100._replace(gpu=H100.gpu._replace(network=1e9))
    assert cost.link_of(slow, 16).bandwidth == 0.7 * 8e9 and cost.link_of(slow, 8) == pytest.approx((315e9, 0.5e-6))


def test_a_collective_takes_its_bytes_and_its_hops():
    each = cost.Collective("all-gather forward", 100.0, 4, 5, cost.Link(25.0, 0.1))
    assert each.seconds == pytest.approx(100 * 3 / 4 / 25 + 5 * 3 * 0.1)
    assert each._replace(rounds=2).seconds == pytest.approx(2 * each.seconds)


@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("selective", 0), ("full", 1), ("offload", 1)])
def test_computation_follows_flops(recompute, again):
    shape = config(f"train.recompute={recompute}", "train.micro_batch=4")
    flops = training_flops(shape.model) + again * forward_flops(shape.model)
    assert time_of(shape).compute == pytest.approx(2048 / 16 * flops / (989e12 * H100.mfu))
    inputs = 4 * 256 * 128 * 4 if recompute == "offload" else 0  # of four blocks, float32
    assert time_of(shape).offload == pytest.approx(2 * 2048 / 16 * inputs / 50e9)


def test_more_micro_batches_send_more_and_compute_as_much():
    one, four = (time_of(config(f"train.micro_batch={size}", "train.engine=fsdp2")) for size in (128, 32))
    assert four.communication == pytest.approx(4 * one.communication) and four.compute == one.compute
    assert four.exposed == one.exposed and four.optimizer == one.optimizer


def test_each_block_of_each_micro_batch_is_launched_except_with_cuda_graphs():
    blocks = weights_of(config().model).blocks
    assert time_of(config("train.engine=fsdp2", "train.micro_batch=32")).launches == 4 * blocks * H100.launch
    alone = Machines(GPUS["h100"], 1, 8)
    words = "train.engine=single", "train.global_batch=128", "train.micro_batch=64"

    def launches(*more: str) -> float:
        return time_of(config(*words, *more), alone).launches

    assert launches("kernels.compile=true") == 0
    once = 0.7 * 2 * blocks * alone.launch
    assert launches() == launches("train.precision=fp16", "kernels.compile=true") == pytest.approx(once)
    for recompute, eager, compiled in (("selective", 2, 1), ("full", 1.5, 1.5), ("offload", 1.5, 1.5)):
        word = f"train.recompute={recompute}"
        assert launches(word) == pytest.approx(eager * once)
        assert launches(word, "kernels.compile=true") == pytest.approx(compiled * once)


def test_blocks_are_compiled_where_the_engine_can_unless_the_config_says_otherwise():
    def compiled(*words: str) -> set[tuple[str, bool]]:
        candidates = found("nano", 2, "h100", *FEW, "train.recompute=none", "train.micro_batch=1", *words).candidates
        return {(candidate.config.train.engine, candidate.config.kernels.compile) for candidate in candidates}

    assert compiled() == {("ddp", True), ("deepspeed", False), ("fsdp2", True)}
    assert compiled("kernels.compile=false") == {("ddp", False), ("deepspeed", False), ("fsdp2", False)}
    assert compiled("train.engine=fsdp2", "kernels.compile=true") == {("fsdp2", True)}


def test_a_step_takes_its_longest_overlapped_part_and_what_is_exposed():
    time = cost.StepTime(compute=5, communication=3, offload=1, launches=2, exposed=0.5, optimizer=0.25, data=2)
    assert time.total == 5.75
    assert time._replace(communication=7).total == 7.25 and time._replace(offload=6).total == 6.75
    assert time._replace(data=9).total == 9 and time._replace(launches=8).total == 8.75


def test_what_is_not_overlapped_is_added():
    shape, quick = config("train.micro_batch=1"), H100._replace(launch=0.0)
    hidden, bare = time_of(shape, quick), time_of(shape, quick._replace(overlap=0.0))
    assert bare.exposed == pytest.approx(bare.communication) and hidden.exposed < 0.1 * hidden.communication
    assert bare.total == pytest.approx(bare.compute + bare.communication + bare.optimizer)


def test_sharding_groups_and_ema_snapshots_in_checkpoints_and_snapshots():
    plain, powers = config("train.engine=fsdp2"), config("train.engine=fsdp2", "optim.ema_snapshots_every=1000")
    weights = weights_of(plain.model)
    assert cost.checkpoint(plain, weights, H100).size == 16 * weights.total
    assert cost.checkpoint(powers, weights, H100).size == 24 * weights.total
    copies = config("train.engine=fsdp2", "train.shard_ranks=8")
    assert cost.snapshot_bytes(plain, weights, H100) == 3 * 16 * weights.total / 2  # two nodes
    # a rank's shard, and the part of it that it writes to a checkpoint
    assert cost.snapshot_bytes(copies, weights, H100) == (2 + 1 / 2) * 16 * weights.total
    assert cost.snapshot_bytes(config("guard.enabled=false"), weights, H100) == 16 * weights.total / 2
    shares = weights.padded_total("fsdp2", 8) / 8, weights.padded_total("fsdp2", 16) / 16
    assert cost.optimizer_bytes(copies, weights, 16) / cost.optimizer_bytes(plain, weights, 16) == shares[0] / shares[1]


@pytest.mark.parametrize(("rows", "ranks", "kept"), [(128, 16, 128), (10, 4, 12), (1, 16, 16)])
def test_shards_of_whole_rows_are_padded(rows, ranks, kept):
    assert padded([torch.Size([rows, 5])], "fsdp2", ranks) == 5 * kept
    assert padded([torch.Size([rows, 5])], "deepspeed", ranks) == -(-rows * 5 // ranks) * ranks


def test_zero3_is_not_planned_with_replicated_weights():
    """Training refuses groups of one, even if a node has one GPU."""
    few = "train.global_batch=16", "data.lanes=16", "train.recompute=full"
    shares = {candidate.config.train.shard_ranks for candidate in found("nano", 16, "h100", *few, per_node=1).candidates}
    assert shares == {None}
    candidates = found("nano", 16, "h100", "train.shard_ranks=1", *few).candidates
    assert candidates and {candidate.config.train.engine for candidate in candidates} == {"fsdp2"}


FSDP2_FULL = ("train.engine=fsdp2", "train.shard_ranks=null", "train.recompute=full", "kernels.compile=false")


def test_fixed_keys_are_not_searched_and_the_fastest_is_first():
    chosen = found("nano", 2, "h100", *FSDP2_FULL)
    trains = [candidate.config.train for candidate in chosen.candidates]
    assert {(train.engine, train.shard_ranks, train.recompute) for train in trains} == {("fsdp2", None, "full")}
    assert sorted(train.micro_batch for train in trains) == [2**n for n in range(11)]
    speeds = [candidate.time_bucket for candidate in chosen.candidates]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    given = found("nano", 2, "h100", *FSDP2_FULL, "train.micro_batch=16")
    assert [candidate.config.train.micro_batch for candidate in given.candidates] == [16]


@pytest.mark.long
def test_exactly_those_that_fit_are_found():
    """A GPU with little memory: some micro-batch sizes fit, larger ones do not, and recomputation frees memory."""
    small = Machines(GPUS["h100"]._replace(memory=0.4e9), 16, 8)
    chosen = search(config(), small, [])
    kinds = {
        (candidate.config.train.engine, candidate.config.train.shard_ranks, candidate.config.train.recompute)
        for candidate in chosen.feasible()
    }
    assert kinds == {
        (engine, shared, recompute)
        for engine, shared in (("ddp", None), ("deepspeed", None), ("deepspeed", 8), ("fsdp2", None), ("fsdp2", 8))
        for recompute in RECOMPUTE
    }
    assert all(candidate.memory.total <= 0.4e9 for candidate in chosen.feasible())
    of = {}
    for candidate in chosen.feasible():
        train = candidate.config.train
        if (train.engine, train.shard_ranks) == ("fsdp2", None):
            of[train.recompute] = max(of.get(train.recompute, 0), train.micro_batch)
    assert of["none"] <= of["selective"] <= of["full"] and of["none"] < of["full"]
    best = chosen.best
    assert chosen.largest(best.config, "bf16") >= best.config.train.micro_batch
    split = next(candidate for candidate in chosen.feasible() if candidate.parts > 1)
    size = split.config.train.micro_batch
    assert (
        chosen.memory(split.config, "tf32", size).total
        > 0.4e9
        >= chosen.memory(split.config, "tf32", size // split.parts).total
    )
    said = text.describe(chosen, "nano", "small")
    assert max(map(len, said.splitlines())) <= 120
    assert f"chosen: {best.name}" in said and "assumptions\n" in said and "runner-up: " in said
    assert "1,024,933,888 (800.0 epochs of ImageNet)" in said and "between nodes (--network)" in said
    assert f"{2048 / best.time.total:,.0f} (" in said and f"{weights_of(config().model).total:,} in 4 blocks" in said


EAGER = ("train.engine=fsdp2", "kernels.compile=false")  # compiled graphs take longer to trace


def test_one_gpu_has_one_engine():
    chosen = found("nano", 1, "h100", *FEW, "train.recompute=none", "train.micro_batch=8", "kernels.compile=false")
    assert [candidate.config.train.engine for candidate in chosen.candidates] == ["single"] and chosen.best.collectives == []
    said = text.describe(chosen, "nano", "h100")
    assert not any(word in said for word in ("network", "overlap:", "exposed", "ZeRO", "nodes"))


def test_the_parts_of_a_step_add_up():
    for words in ([*EAGER, "guard.enabled=false"], ["train.engine=deepspeed", "train.recompute=offload"]):
        chosen = found("nano", 8, "h100", *FEW, *words, "train.micro_batch=1", loader=1e9, hop=1e-2)
        said = text.describe(chosen, "nano", "h100")
        line = next(line for line in said.splitlines() if line.startswith("step "))
        beside, alone, optimizer, total = map(float, re.fullmatch(r"step +(.*) \+ (.*) \+ (.*) = (.*) ms", line).groups())
        assert beside + alone + optimizer == pytest.approx(total, abs=0.02)
        assert total == pytest.approx(1e3 * chosen.best.time.total, abs=0.01)
        largest = max(float(each) for each in re.findall(r"^(?:compute|.* \(overlapped\)) +(\S+) ms", said, re.MULTILINE))
        assert largest == beside and "network: NVLink" in said and "between nodes" not in said
    waiting = found("nano", 8, "h100", *FEW, *EAGER, "guard.enabled=false", "train.micro_batch=1", loader=1.0)
    assert "ms, bound by data loading" in text.describe(waiting, "nano", "h100")


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({}, "compute"),
        ({"communication": 8}, "communication"),
        ({"exposed": 5.5}, "communication"),
        ({"offload": 6}, "activation offload"),
        ({"launches": 6}, "kernel launches"),
        ({"data": 9}, "data loading"),
    ],
)
def test_a_step_is_bound_by_its_longest_part(change, bound):
    """Not by exposed communication that is shorter, nor by data that is loaded before the step ends."""
    chosen = found("nano", 8, "h100", *FEW, *EAGER, "train.micro_batch=1")
    time = cost.StepTime(compute=5, communication=6, offload=1, launches=2, exposed=2, optimizer=0.25, data=6)
    time = time._replace(**change)
    candidate = dataclasses.replace(chosen.best, time=time)
    assert f"bound by {bound};" in text.describe(dataclasses.replace(chosen, candidates=[candidate]), "nano", "h100")


def test_data_per_node_is_that_of_a_full_node():
    words = "train.global_batch=96", "data.lanes=12", "train.micro_batch=8"
    chosen = found("nano", 12, "h100", *EAGER, *words, loader=1e9)
    samples = 8 * 8 / chosen.best.time.total
    assert f"{samples:,.0f} samples/s" in text.describe(chosen, "nano", "h100")


def test_a_loss_scale_rules_out_deepspeed():
    chosen = found("nano", 2, "a100", "train.precision=fp16", "train.recompute=none", "train.micro_batch=64")
    assert {candidate.config.train.engine for candidate in chosen.candidates} == {"ddp", "fsdp2"}


PLAN = ["plan", "--model", "nano", "--gpus", "4", "--gpu", "h100"]
QUICK = ["train.recompute=none", "train.micro_batch=8", "train.global_batch=32", "data.lanes=8"]
QUICK += ["guard.enabled=false"]  # a table of the memory after a fallback takes as long as the other one


@pytest.mark.parametrize(("engine", "more"), [("deepspeed", ["train.global_batch=64", "guard.enabled=true"]), ("fsdp2", [])])
def test_what_is_written_is_what_training_takes(engine, more, capsys, tmp_path):
    out = tmp_path / "plan"
    assert main([*PLAN, "--out", str(out), *QUICK, f"train.engine={engine}", *more]) == 0
    assert str(out / "config.yaml") in capsys.readouterr().out
    assert main(["train", "--config", str(out / "config.yaml"), "--run-dir", str(tmp_path), "--print-config"]) == 0
    planned = Config.from_dict(read_yaml(out / "config.yaml"))
    assert capsys.readouterr().out == planned.to_yaml()
    assert (planned.train.engine, planned.train.micro_batch, planned.train.recompute) == (engine, 8, "none")
    assert (out / "ds_config.json").exists() == (engine == "deepspeed")
    if engine == "deepspeed":
        settings = deepspeed_settings(planned, 4)
        block = weights_of(planned.model).block
        assert settings["zero_optimization"]["reduce_bucket_size"] == block and settings["gradient_accumulation_steps"] == 2
        device = torch.device("cuda", 0)
        known = rank_memory(planned, "tf32", 8, 4, device).unreduced  # as the run reads it from the file
        assert known == WEIGHT * (block + weights_of(planned.model).largest)


def test_compiled_blocks_may_be_requested_whatever_engine_the_recipe_has(capsys):
    assert main([*PLAN, *QUICK, "kernels.compile=true"]) == 0
    assert "chosen: DDP, compiled" in capsys.readouterr().out


def test_foreign_files_are_kept_and_reported_before_the_search(capsys, tmp_path, monkeypatch):
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr("xar_scale.plan.search.search", lambda *_: pytest.fail("the search ran first"))
    assert_ends(capsys, [*PLAN, "--out", tmp_path, *QUICK], 64, "holds notes, which no plan writes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]


def test_an_earlier_plan_is_replaced(tmp_path):
    for engine in ("deepspeed", "fsdp2"):
        assert main([*PLAN, "--out", str(tmp_path), *QUICK, f"train.engine={engine}"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["--model", "xar_9b"], 64, ["no model 'xar_9b'; available: nano, xar_b"]),
        (["--gpu", "v100"], 64, ["no GPU 'v100'; available: a100, h100"]),
        (["--gpus", "0"], 64, ["--gpus 0: must be at least 1"]),
        (["--gpus-per-node", "0"], 64, ["--gpus-per-node 0: must be at least 1"]),
        (["--mfu", "40"], 64, ["--mfu 40: must be above 0 and at most 1"]),
        (["--launch", "-1"], 64, ["--launch -1: must be at least 0 ms"]),
        (["--network", "0"], 64, ["--network 0: must be above 0 GB/s"]),
        (["--recipe", "nosuch"], 64, ["no recipe 'nosuch'"]),
        (["train.ds_config=x.json"], 64, ["the plan writes one"]),
        (["--gpus", "3"], 78, ["3 GPUs: 3 x 682 + 2; with data.lanes 128 the nearest are 1920 and 2304"]),
        (["--gpus", "17", "--recipe", "digits"], 78, ["17 x 7 + 9; with data.lanes 8 the nearest is 136"]),
        (["train.micro_batch=3"], 78, ["micro_batch 3"]),
        (["train.engine=deepspeed", "train.precision=fp16"], 78, ["train.precision fp16 needs a loss scale"]),
        (["train.engine=single"], 78, ["single is one process, not 4"]),
        (["train.shard_ranks=3"], 78, ["world 4 is not divisible by train.shard_ranks 3"]),
        (
            ["train.engine=deepspeed", "train.shard_ranks=1"],
            78,
            ["train.shard_ranks 1 replicates the weights on each rank", "use ddp"],
        ),
        (
            ["model.width=20480", "model.heads=160", *QUICK],
            78,
            ["no candidate fits in 80 GB per GPU on 4 GPUs", "leave train.micro_batch"],
        ),
    ],
)
def test_wrong_plans(capsys, words, code, parts):
    assert_ends(capsys, [*PLAN, *words], code, *parts)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ([], ["--engine", "single", "--batch", "8"]),
        (
            TORCHRUN,
            ["--engine", "fsdp2", "--batch", "8", "--precision", "bf16"],
        ),
        ([], ["--engine", "fsdp2", "--batch", "4", "--ranks", "512"]),
        ([], ["--engine", "deepspeed", "--batch", "8", "--ranks", "512"]),
        ([], ["--engine", "ddp", "--batch", "4", "--ranks", "512"]),
    ],
    ids=["single", "fsdp2 on 2 ranks", "fsdp2 of 512", "ZeRO-3 of 512", "DDP of 512"],
)
def test_memory_of_real_steps_is_as_estimated(launch, words):
    command = [sys.executable, *launch, "tools/bench.py", "memory", "--model", "nano", *words]
    kept = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True, timeout=400)
    rows = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|"))
    estimated, measured = float(rows["estimated"]), float(rows["measured: allocator"].split()[0])
    assert estimated == pytest.approx(measured, rel=0.05)
