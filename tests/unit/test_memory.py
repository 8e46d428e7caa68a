"""Memory reckoned beforehand: what is measured, how the fallback is split, and that training splits it so."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from tests.conftest import digits_config
from xar_scale import dist
from xar_scale.bench.record import read_record
from xar_scale.cli import main
from xar_scale.config import Config, merge
from xar_scale.engines import Engine
from xar_scale.evaluate.digits import cache_digits
from xar_scale.flow import velocity_loss
from xar_scale.guard import Bad
from xar_scale.memory import fallback, passes, rank
from xar_scale.memory.fallback import plan_fallback
from xar_scale.memory.passes import PassMemory, extrapolated_passes, pass_memory
from xar_scale.memory.rank import rank_memory, weights_of
from xar_scale.model.aligned import CHANNELS
from xar_scale.model.layers import mlp_width
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import initial_weights, meta_model
from xar_scale.precision import MODES
from xar_scale.presets import model_values, recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SAMPLES = 2
GRID = ["model.channels=16", "model.grid=[16,16]"]
NANO = GRID
REDUCED_B = [*GRID, "model.width=768", "model.heads=12"]


def config_of(*overrides: str) -> Config:
    return digits_config("train.engine=single", *overrides)


def real_pass(config: Config, mode: str, device: torch.device = CPU):
    """The forward pass of real tensors, as a function; its backward pass is the result's."""
    model = meta_model(config.model)
    compute = MODES[mode].compute
    model.use_kernels(config.kernels, device, compute, training=True)
    apply_recompute(model.blocks, config.train.recompute, compiled=config.kernels.compile)
    for weight in initial_weights(model, seed=0):
        weight.place(device).register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    layout = model.layout
    latents = torch.randn(SAMPLES, config.model.channels, *layout.grid, device=device)
    noise = torch.randn(SAMPLES, layout.tokens, config.model.channels, device=device)
    t, labels = torch.rand(SAMPLES, layout.entities, device=device), torch.zeros(SAMPLES, dtype=torch.int64, device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=compute, enabled=compute is not torch.float32):
            return velocity_loss(model, layout, latents, noise, t, labels)

    return model, forward


def allocated(config: Config, mode: str) -> list[int]:
    """As the allocator of the CPU saw it: left by the forward pass, its peak, that of both."""
    _, forward = real_pass(config, mode)
    forward().backward()  # what is made once is there
    sizes = []
    for backward in (False, True):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            loss = forward()
            if backward:
                loss.backward()
        events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        level = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            highest = max(highest, level)
        sizes += [highest] if backward else [level, highest]
        del loss
    return sizes


def hooked(config: Config, mode: str) -> int:
    """Bytes of different storages that autograd saves, but for parameters."""
    model, forward = real_pass(config, mode)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(size for pointer, size in saved.items() if pointer not in own)


# a CPU without 16 bits of its own takes minutes for the larger
@pytest.mark.parametrize(
    "sizes", [pytest.param(NANO, id="nano"), pytest.param(REDUCED_B, id="reduced xar_b", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("recompute", ["none", "full", "selective", "offload"])
@pytest.mark.parametrize("mode", ["bf16", "tf32"])
def test_a_pass_takes_what_the_allocator_gives_it(sizes, recompute, mode):
    config = config_of(*sizes, f"train.recompute={recompute}")
    reckoned, measured = pass_memory(config, mode, SAMPLES, CPU), allocated(config, mode)
    assert [reckoned.saved, reckoned.forward, reckoned.peak] == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("change", ["kernels.attention=dense", "kernels.attention=prefix", "model.dropout=0.1"])
@pytest.mark.parametrize("mode", ["bf16", "tf32"])
def test_the_forward_pass_leaves_what_autograd_saves(recompute, change, mode):
    """Selective recomputation keeps its products where hooks do not see them: the allocator does, above."""
    config = config_of(*REDUCED_B, f"train.recompute={recompute}", change)
    assert pass_memory(config, mode, SAMPLES, CPU).saved == pytest.approx(hooked(config, mode), rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", ["none", "full", "selective", "offload"])
@pytest.mark.parametrize("mode", ["bf16", "tf32"])
def test_a_pass_takes_what_a_gpu_gives_it(recompute, mode):
    config, device = config_of(*REDUCED_B, f"train.recompute={recompute}", "model.dropout=0.1"), torch.device("cuda", 0)
    _, forward = real_pass(config, mode, device)
    forward().backward()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward().backward()
    measured = torch.cuda.max_memory_allocated(device) - before
    assert pass_memory(config, mode, SAMPLES, device).peak == pytest.approx(measured, rel=0.1)


def test_copies_of_weights_count_where_autocast_makes_them():
    """Not with an engine that gathers them in 16 bits; in float32 there are none."""
    config = config_of(*REDUCED_B)
    cut = dataclasses.replace(config, train=dataclasses.replace(config.train, engine="deepspeed"))
    linear = sum(layer.weight.numel() for layer in meta_model(config.model).modules() if isinstance(layer, nn.Linear))
    more = pass_memory(config, "bf16", SAMPLES, CPU).saved - pass_memory(cut, "bf16", SAMPLES, CPU).saved
    assert more == pytest.approx(2 * linear, rel=0.05)
    assert pass_memory(config, "tf32", SAMPLES, CPU) == pass_memory(cut, "tf32", SAMPLES, CPU)


@pytest.mark.long
def test_a_compiled_pass_takes_what_the_allocator_gives_it():
    """Real graphs of a CPU, by Inductor, in which more is fused than is reckoned."""
    config = config_of(*NANO, "kernels.compile=true", "model.dropout=0.1")
    reckoned, measured = pass_memory(config, "tf32", SAMPLES, CPU), allocated(config, "tf32")
    assert reckoned.saved == pytest.approx(measured[0], rel=0.05)
    assert reckoned.peak == pytest.approx(measured[2], rel=0.1)


RECORDS = Path(__file__).parents[2] / "docs" / "benchmarks" / "records"


@pytest.mark.parametrize("name", ["step-bf16", "step-bf16-64", "step-fsdp2-64"])
def test_a_compiled_step_is_reckoned_as_an_h200_took_it(name):
    """xar_h, of 1.19 billion weights, as it was measured there."""
    record = read_record(RECORDS / f"2026-11-27-h200-{name}.json")
    settings = record.settings
    assert settings["compile"] and settings["recompute"] == "none"
    model = {**model_values(settings["model"]), "dropout": settings["dropout"]}
    train = {"global_batch": settings["batch"], "engine": settings["engine"], "precision": settings["precision"]}
    changes = {"model": model, "train": train, "kernels": {"compile": True}, "data": {"lanes": 1}}
    config = Config.from_dict(merge(recipe("imagenet256_h"), changes))
    needed = rank_memory(config, settings["precision"], settings["batch"], 1, CUDA, extrapolated_passes())
    assert sum(needed) / 1e9 == pytest.approx(record.memory_gb, rel=0.02)


LONG = pytest.mark.long
IMAGES = [*GRID, "model.depth_encoder=3", "model.depth_decoder=4"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own kernels stand there")


@pytest.mark.parametrize("recompute", ["full", *(pytest.param(mode, marks=LONG) for mode in ("none", "selective", "offload"))])
@pytest.mark.parametrize("mode", ["bf16", pytest.param("tf32", marks=LONG)])
def test_shallow_passes_tell_of_deep_ones(recompute, mode):
    """Where activations count, and where copies of weights do: in bf16 a wide network's are most of a small pass."""
    found_by = extrapolated_passes()
    for sizes, numbers in ([IMAGES, (1, 24, 600)], [[*REDUCED_B, *IMAGES[2:]], (3, 24)]):
        config = config_of(*sizes, f"train.recompute={recompute}", "model.dropout=0.1")
        for samples in numbers:
            found, real = found_by(config, mode, samples, CUDA), pass_memory(config, mode, samples, CUDA)
            assert found == pytest.approx(real, rel=0.03) and min(a - b for a, b in zip(found, real, strict=True)) > -1e6


@without_gpu
def test_a_gpu_that_is_not_there_keeps_what_its_kernels_keep():
    """Of dropout a byte an element; of attention no probabilities; with offload no block's input but the one at work on."""
    shape = config_of(*IMAGES).model
    saved = {share: pass_memory(config_of(*IMAGES, f"model.dropout={share}"), "tf32", 8, CUDA).saved for share in (0.0, 0.1)}
    tokens, blocks = 8 * 256, 7
    hidden = -(-mlp_width(shape) // CHANNELS) * CHANNELS
    assert saved[0.1] - saved[0.0] == tokens * blocks * (2 * shape.width + hidden)
    assert saved[0.1] < pass_memory(config_of(*IMAGES, "model.dropout=0.1"), "tf32", 8, CPU).saved
    check_offload(blocks, 4 * tokens * shape.width)


def test_graphs_keep_no_padded_copies_of_weights_that_are_gathered(monkeypatch):
    """They would be the MLPs' of all blocks. Rows of 80 channels, and 213 hidden ones, with zeros 216."""
    config = config_of(*GRID, "model.width=80", "model.heads=5", "train.engine=fsdp2", "kernels.compile=true")

    def saved() -> int:
        passes._known_graph.cache_clear()
        return pass_memory(config, "bf16", SAMPLES, CUDA).saved

    without = saved()
    monkeypatch.setattr(passes, "weights_are_gathered", lambda model: None)
    assert saved() - without == weights_of(config.model).blocks * 3 * 80 * 216 * 2
    passes._known_graph.cache_clear()


def test_compiled_blocks_leave_the_host_their_inputs_too():
    """In bf16: what is added block by block is in float32."""
    check_offload(7, 4 * 8 * 256 * config_of(*IMAGES).model.width, "bf16", "kernels.compile=true")


def check_offload(blocks: int, one: int, mode: str = "tf32", *overrides: str) -> None:
    """Of inputs of ``one`` size each the device keeps the one at work on."""
    full, offload = (
        pass_memory(config_of(*IMAGES, f"train.recompute={recompute}", *overrides), mode, 8, CUDA)
        for recompute in ("full", "offload")
    )
    assert full.peak - offload.peak == (blocks - 1) * one
    assert full.saved - offload.saved == blocks * one


def test_attention_that_is_named_is_reckoned_as_the_one_that_is_chosen():
    """flash, too, where no GPU is: a run of many may be planned anywhere."""
    named = [config_of(*GRID, f"kernels.attention={name}") for name in ("auto", "flash")]
    chosen, flash = (pass_memory(config, "bf16", 2, CUDA) for config in named)
    assert chosen == flash


def test_what_is_added_block_by_block_is_of_the_same_type_under_every_engine():
    saved = {
        engine: pass_memory(config_of(*GRID, f"train.engine={engine}", "train.recompute=full"), "bf16", 8, CUDA).saved
        for engine in ("single", "fsdp2", "deepspeed")
    }
    assert saved["fsdp2"] == pytest.approx(saved["deepspeed"], rel=0.02) and saved["fsdp2"] < 1.1 * saved["single"]


@pytest.mark.parametrize(
    ("saved", "peak", "gone", "unreduced"),
    [(400, 410, 0, 0), (0.4, 5.4, 0.1, 1), (0.4, 0.9, 0.7, 2)],
    ids=["before any block's gradients", "beside one block's", "beside two"],
)
def test_under_fsdp2_a_block_s_gradients_come_as_its_activations_go(saved, peak, gone, unreduced):
    """Sizes in a block's gradients; a block leaves saved / 4."""
    config = config_of("train.engine=fsdp2", "train.global_batch=512", "train.micro_batch=1", *GRID)
    weights = weights_of(config.model)
    one = 4 * rank.padded(weights.inside, "fsdp2", 512)
    assert weights.blocks == 4
    stub = PassMemory(round(saved * one), 0, round(peak * one))
    needed = rank_memory(config, "tf32", 1, 512, CUDA, passes=lambda *_: stub)
    assert needed.unreduced == unreduced * one
    assert needed.activations == pytest.approx((peak - gone) * one)


def test_gradients_come_as_activations_go_where_a_step_is_one_pass():
    one, two = (
        rank_memory(config_of(f"train.global_batch={size}", "train.micro_batch=64", *GRID), "tf32", 64, 1, CPU)
        for size in (64, 128)
    )
    assert (one.gradients, two.gradients) == (0, 4 * weights_of(config_of(*GRID).model).whole)
    assert one.activations == two.activations > 0


def test_neighbours_copies_are_counted_once():
    """hpZ: masters stay cut over all ranks, and each keeps its part of the neighbours' copy."""
    plain = digits_config("train.engine=deepspeed", "train.global_batch=128", "train.micro_batch=8", *GRID)
    shared = dataclasses.replace(plain, train=dataclasses.replace(plain.train, shard_ranks=4))
    weights = weights_of(plain.model).whole
    more = rank_memory(shared, "tf32", 8, 16, CPU).parameters - rank_memory(plain, "tf32", 8, 16, CPU).parameters
    assert more == pytest.approx(4 * weights / 4, rel=1e-3)


def test_memory_grows_with_samples_and_falls_with_recomputation():
    peaks = {
        recompute: [pass_memory(config_of(f"train.recompute={recompute}", *GRID), "tf32", size, CPU).peak for size in (1, 2, 8)]
        for recompute in ("none", "selective", "full")
    }
    assert all(sizes == sorted(set(sizes)) for sizes in peaks.values())
    assert peaks["none"][2] > peaks["selective"][2] > peaks["full"][2]
    assert pass_memory(config_of(*GRID), "bf16", 8, CPU).peak < peaks["none"][2]


def test_a_rank_needs_less_among_more_ranks():
    config = digits_config("train.engine=fsdp2", "train.global_batch=256", "train.micro_batch=8", *REDUCED_B)
    needs = [rank_memory(config, "tf32", 8, world, CPU) for world in (1, 2, 16)]
    states = [sum(need[:4]) for need in needs]  # masters, moments, averages, gradients
    assert states == sorted(set(states), reverse=True)
    copies = dataclasses.replace(config, train=dataclasses.replace(config.train, shard_ranks=2))
    assert rank_memory(copies, "tf32", 8, 16, CPU) == needs[1]
    weights = weights_of(config.model)
    assert states[0] == 20 * weights.whole and states[1] == 20 * weights.cut("fsdp2", 2) / 2


SMALL = rank.Weights((torch.Size([8, 4]),), 3, (torch.Size([100, 4]),))  # 496: 124 a rank of four
WIDE = rank.Weights((torch.Size([800_000_000]),), 3, ())


@pytest.mark.parametrize(
    ("weights", "words", "needed"),
    [
        # What is in no block comes last, in float32: of the moments that one needs most
        (SMALL, "train.engine=fsdp2", (496, 992, 496, 496, 4 * 400 + 2 * 2 * 32, 4 * 400, 30, 0)),
        (SMALL, "train.engine=fsdp2 optim.ema_snapshots_every=9", (496, 992, 3 * 496, 496, 1728, 1600, 30, 0)),
        # A bucket of ten in bf16 and one in float32, and the largest gradient; gradients stay also in a step of one pass
        (SMALL, "train.engine=deepspeed", (992, 992, 496, 496, 4 * 496, 10 * (2 + 4) + 4 * 400, 330, 0)),
        # Two blocks, where these are more than ZeRO-3 keeps: 0.6e9 weights a rank, in GB
        (WIDE, "train.engine=deepspeed", (4.8e9, 4.8e9, 2.4e9, 2.4e9, 6.4e9, 60 + 3.2e9, 330, 0)),
    ],
    ids=["fsdp2", "power averages", "ZeRO-3", "ZeRO-3 with wide blocks"],
)
def test_each_part_of_a_rank_s_memory(weights, words, needed, monkeypatch):
    monkeypatch.setattr(rank, "weights_of", lambda _: weights)
    config = digits_config("train.global_batch=8", "train.micro_batch=2", "train.precision=bf16", *words.split())
    found = rank_memory(config, "bf16", 2, 4, CUDA, lambda *_: PassMemory(300, 310, 330), bucket=10)
    assert tuple(found) == needed and found.total == pytest.approx(1.1 * sum(needed))


def test_what_is_known_of_a_pass_is_of_no_other(monkeypatch):
    """Each that is measured gets a number of its own."""
    measured = []

    def measure(*which):
        measured.append(which)
        return PassMemory(*[len(measured)] * 3)

    monkeypatch.setattr(passes, "pass_memory", measure)
    found_by = extrapolated_passes.__wrapped__()

    def found(*words: str, mode: str = "bf16", samples: int = 1) -> PassMemory:
        return found_by(config_of(*GRID, *words), mode, samples, CUDA)

    changes = [f"train.recompute={mode}" for mode in ("none", "selective", "full", "offload")]
    changes += ["train.engine=fsdp2", "train.engine=deepspeed", "kernels.compile=true", "model.dropout=0.1"]
    known = [*map(found, changes), found(mode="tf32"), found(samples=8)]
    assert len({*known}) == len(known) and len(measured) == 2 * len(known)
    assert [*map(found, changes)] == known[: len(changes)]
    assert found("train.engine=fsdp2", mode="tf32") == found(mode="tf32")  # where no engine gathers in 16 bits
    assert len(measured) == 2 * len(known)


def test_a_network_of_a_billion_weights_is_reckoned_without_them():
    config = config_of(*(f"model.{key}={value}" for key, value in model_values("xar_h").items()), *GRID)
    none = pass_memory(config, "tf32", 64, CPU)
    assert 80e9 < none.saved < none.peak < 95e9


# Gigabytes of a pass, by samples: 1 a sample in TF32, 0.5 in bf16; the state takes none
@pytest.fixture
def simple(monkeypatch):
    def needs(config, mode, samples, *_):
        gigabytes = samples * (0.5 if mode == "bf16" else 1)
        return rank.RankMemory(0, 0, 0, 0, activations=1e9 * gigabytes / rank.MARGIN)

    monkeypatch.setattr(fallback, "rank_memory", needs)

    def plan(room_gb: float, *overrides: str, micro: int = 64) -> tuple[int, str]:
        changes = (f"train.micro_batch={micro}", f"train.global_batch={2 * micro}", "data.lanes=1", *overrides)
        return plan_fallback(digits_config("train.precision=bf16", *changes), 2, CPU, room_gb * 1e9)

    return plan


@pytest.mark.parametrize(("room", "parts"), [(64, 1), (63.9, 2), (32, 2), (31.9, 4), (16, 4), (15.9, 8), (1, 64), (0.9, 64)])
def test_as_few_parts_as_fit(simple, room, parts):
    assert simple(room)[0] == parts


def test_the_warning_has_the_numbers(simple):
    assert simple(64) == (1, "")
    assert simple(40) == (
        2,
        "TF32 after a fallback needs about 64 GB of 40 GB: it will run each pass in 2 parts (micro_batch 64 as 2 x 32)",
    )
    parts, warning = simple(7, micro=12)
    assert parts == 2 and warning.endswith("(micro_batch 12 as 2 x 6)")
    parts, warning = simple(7.9, micro=15)
    assert parts == 3 and warning.endswith("(micro_batch 15 as 3 x 5)")


def test_single_samples_that_do_not_fit_are_warned_of(simple):
    parts, warning = simple(0.7, micro=1)
    assert (parts, warning) == (
        1,
        "TF32 after a fallback needs about 1.0 GB of 0.7 GB, with one sample a pass still 1.0 GB: it may run out of memory",
    )


def test_what_does_not_fit_without_a_fallback_is_no_business_of_its(simple):
    parts, warning = simple(31)
    assert (parts, warning) == (4, "")


@pytest.mark.parametrize("without", ["train.precision=tf32", "train.precision=fp32", "guard.enabled=false"])
def test_runs_that_never_fall_back_reckon_nothing(simple, without, monkeypatch):
    monkeypatch.setattr(fallback, "rank_memory", None)
    assert simple(0.1, without) == (1, "")


def test_the_rank_with_the_least_memory_decides(simple, monkeypatch, capsys):
    gathered = []
    monkeypatch.setattr(dist, "gather_objects", lambda value: gathered.append(value) or [50 * 10**9, 33 * 10**9])
    monkeypatch.setattr(dist, "on_rank_0", lambda work: work())
    config = digits_config("train.precision=bf16", "train.micro_batch=64")
    assert fallback.fallback_splits(config, CPU) == 2
    assert gathered == [fallback.device_memory(CPU)]
    assert capsys.readouterr().out.startswith("memory: TF32 after a fallback needs about 64 GB of 33 GB")


def test_a_machines_memory_is_shared_by_its_ranks(monkeypatch):
    whole = fallback.device_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fallback.device_memory(CPU) == whole // 4


def test_what_cannot_be_reckoned_ends_no_run(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no such\noperation")

    monkeypatch.setattr(fallback, "rank_memory", fail)
    assert fallback.fallback_splits(digits_config("train.precision=bf16"), CPU) == 1
    said = capsys.readouterr().out
    assert "cannot be reckoned here (RuntimeError: no such operation)" in said and said.count("\n") == 1


@pytest.mark.parametrize("little", [False, True])
def test_training_splits_the_fallback_as_reckoned(tmp_path, monkeypatch, capsys, little):
    """A run in bf16 whose every step in it fails; said once, and only where it does not fit."""
    cache_digits(tmp_path / "data", 1000)
    settings = ["train.engine=single", "train.precision=bf16", "train.steps=2", "train.global_batch=128"]
    settings += ["optim.warmup_steps=1", "data.workers=0"]
    arguments = ["train", "--recipe", "digits", "--run-dir", str(tmp_path / "run"), f"data.path={tmp_path / 'data'}", *settings]
    config = digits_config(*settings)
    need = {size: rank_memory(config, "tf32", size, 1, CPU).total for size in (64, 128)}
    room = (need[64] + 2 * need[128]) / 3
    monkeypatch.setattr(fallback, "device_memory", lambda device: room if little else 2 * need[128])
    attempt, seen = Engine.attempt, []

    def failing_in_bf16(engine, *arguments):
        verdict = attempt(engine, *arguments)
        seen.append((engine.mode, engine.splits))
        return dataclasses.replace(verdict, bad=Bad.GRADIENT) if engine.mode == "bf16" else verdict

    monkeypatch.setattr(Engine, "attempt", failing_in_bf16)
    assert main(arguments) == 0
    assert dict(seen) == {"bf16": 1, "tf32": 2 if little else 1}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory:")]
    assert len(said) == little
    assert not little or said[0].endswith("it will run each pass in 2 parts (micro_batch 128 as 2 x 64)")
