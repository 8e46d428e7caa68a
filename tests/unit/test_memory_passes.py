"""Estimates of a forward and backward pass on fake tensors, against the allocator."""

import dataclasses
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from tests.unit.memory_configs import CPU, CUDA, GRID, REDUCED_B, config_of
from xar_scale.config import Config
from xar_scale.flow import velocity_loss
from xar_scale.memory import passes
from xar_scale.memory.passes import PassMemory, pass_estimator, pass_memory
from xar_scale.memory.rank import weights_of
from xar_scale.model.aligned import CHANNELS
from xar_scale.model.layers import mlp_width
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import initial_weights, meta_model
from xar_scale.precision import MODES
from xar_scale.presets import model_values

SAMPLES = 2
NANO = GRID


def real_pass(config: Config, mode: str, device: torch.device = CPU):
    """Return a model and a function that runs its forward pass on real tensors and returns the loss."""
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
    """Bytes from the CPU allocator: saved by the forward pass, its peak, the peak of both passes."""
    _, forward = real_pass(config, mode)
    forward().backward()  # allocate what is allocated once
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
    """Bytes of the distinct storages that autograd saves, without parameters."""
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


# a CPU without native 16-bit arithmetic takes minutes for the larger one
@pytest.mark.parametrize(
    "sizes", [pytest.param(NANO, id="nano"), pytest.param(REDUCED_B, id="reduced xar_b", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("recompute", ["none", "full", "selective", "offload"])
@pytest.mark.parametrize("mode", ["bf16", "tf32"])
def test_the_estimate_matches_the_allocator(sizes, recompute, mode):
    config = config_of(*sizes, f"train.recompute={recompute}")
    estimated, measured = pass_memory(config, mode, SAMPLES, CPU), allocated(config, mode)
    assert [estimated.saved, estimated.forward, estimated.peak] == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("recompute", "change"),
    [
        ("none", "kernels.attention=dense"),
        ("none", "kernels.attention=prefix"),
        ("none", "model.dropout=0.1"),
        ("full", "model.dropout=0.1"),  # of a block only its input is saved, whatever is in it
    ],
)
@pytest.mark.parametrize("mode", ["bf16", "tf32"])
def test_saved_bytes_are_what_autograd_saves(recompute, change, mode):
    """Not selective recomputation, whose products hooks do not see; the test above covers it by the allocator."""
    config = config_of(*REDUCED_B, f"train.recompute={recompute}", change)
    assert pass_memory(config, mode, SAMPLES, CPU).saved == pytest.approx(hooked(config, mode), rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", ["none", "full", "selective", "offload"])
@pytest.mark.parametrize("mode", ["bf16", "tf32"])
def test_the_estimate_matches_a_gpu_s_allocator(recompute, mode):
    config, device = config_of(*REDUCED_B, f"train.recompute={recompute}", "model.dropout=0.1"), torch.device("cuda", 0)
    _, forward = real_pass(config, mode, device)
    forward().backward()
    gc.collect()  # models of earlier tests
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward().backward()
    measured = torch.cuda.max_memory_allocated(device) - before
    assert pass_memory(config, mode, SAMPLES, device).peak == pytest.approx(measured, rel=0.1)


def test_compiled_selective_blocks_keep_attention_that_draws_dropout():
    def saved(*changes: str) -> int:
        config = config_of(*REDUCED_B, "train.engine=fsdp2", "train.recompute=selective", *changes)
        return pass_memory(config, "bf16", SAMPLES, torch.device("cuda")).saved

    compiled, eager = (saved("model.dropout=0.1", f"kernels.compile={on}") for on in ("true", "false"))
    assert compiled == pytest.approx(saved("model.dropout=0.0"), rel=0.01)
    assert eager < 0.97 * compiled


def test_copies_of_weights_count_where_autocast_makes_them():
    """Not with an engine that gathers weights in 16 bits; in float32 there are no copies."""
    config = config_of(*REDUCED_B)
    cut = dataclasses.replace(config, train=dataclasses.replace(config.train, engine="deepspeed"))
    linear = sum(layer.weight.numel() for layer in meta_model(config.model).modules() if isinstance(layer, nn.Linear))
    more = pass_memory(config, "bf16", SAMPLES, CPU).saved - pass_memory(cut, "bf16", SAMPLES, CPU).saved
    assert more == pytest.approx(2 * linear, rel=0.05)
    assert pass_memory(config, "tf32", SAMPLES, CPU) == pass_memory(cut, "tf32", SAMPLES, CPU)


@pytest.mark.long
def test_the_estimate_of_compiled_blocks_matches_the_allocator():
    """Real CPU graphs from Inductor, which fuse more than the estimate assumes."""
    config = config_of(*NANO, "kernels.compile=true", "model.dropout=0.1")
    estimated, measured = pass_memory(config, "tf32", SAMPLES, CPU), allocated(config, "tf32")
    assert estimated.saved == pytest.approx(measured[0], rel=0.05)
    assert estimated.peak == pytest.approx(measured[2], rel=0.1)


LONG = pytest.mark.long
IMAGES = [*GRID, "model.depth_encoder=3", "model.depth_decoder=4"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its own kernels are used")


@pytest.mark.parametrize("recompute", ["full", *(pytest.param(mode, marks=LONG) for mode in ("none", "selective", "offload"))])
@pytest.mark.parametrize("mode", ["bf16", pytest.param("tf32", marks=LONG)])
def test_shallow_networks_predict_deep_ones(recompute, mode):
    """Both where activations dominate and where copies of weights do, as in a small bf16 micro-batch of a wide network."""
    found_by = pass_estimator()
    for sizes, numbers in ([IMAGES, (1, 24, 600)], [[*REDUCED_B, *IMAGES[2:]], (3, 24)]):
        config = config_of(*sizes, f"train.recompute={recompute}", "model.dropout=0.1")
        for samples in numbers:
            found, real = found_by(config, mode, samples, CUDA), pass_memory(config, mode, samples, CUDA)
            assert found == pytest.approx(real, rel=0.03) and min(a - b for a, b in zip(found, real, strict=True)) > -1e6


@without_gpu
def test_an_emulated_gpu_saves_what_its_kernels_save():
    """One byte per element of dropout, no attention probabilities; with offload only the current block's input."""
    shape = config_of(*IMAGES).model
    saved = {share: pass_memory(config_of(*IMAGES, f"model.dropout={share}"), "tf32", 8, CUDA).saved for share in (0.0, 0.1)}
    tokens, blocks = 8 * 256, 7
    hidden = -(-mlp_width(shape) // CHANNELS) * CHANNELS
    assert saved[0.1] - saved[0.0] == tokens * blocks * (2 * shape.width + hidden)
    assert saved[0.1] < pass_memory(config_of(*IMAGES, "model.dropout=0.1"), "tf32", 8, CPU).saved
    check_offload(blocks, 4 * tokens * shape.width)


def test_graphs_save_no_padded_copies_of_gathered_weights(monkeypatch):
    """They would be those of all MLPs. Rows have 80 channels, and 213 hidden channels, padded to 216."""
    config = config_of(*GRID, "model.width=80", "model.heads=5", "train.engine=fsdp2", "kernels.compile=true")

    def saved() -> int:
        passes._cached_graph.cache_clear()
        return pass_memory(config, "bf16", SAMPLES, CUDA).saved

    without = saved()
    monkeypatch.setattr(passes, "mark_weights_gathered", lambda model: None)
    assert saved() - without == weights_of(config.model).blocks * 3 * 80 * 216 * 2
    passes._cached_graph.cache_clear()


def test_compiled_blocks_offload_their_inputs_too():
    """In bf16; the residual stream is float32."""
    check_offload(7, 4 * 8 * 256 * config_of(*IMAGES).model.width, "bf16", "kernels.compile=true")


def check_offload(blocks: int, one: int, mode: str = "tf32", *overrides: str) -> None:
    """Of block inputs of ``one`` bytes each the device keeps only the current one."""
    full, offload = (
        pass_memory(config_of(*IMAGES, f"train.recompute={recompute}", *overrides), mode, 8, CUDA)
        for recompute in ("full", "offload")
    )
    assert full.peak - offload.peak == (blocks - 1) * one
    assert full.saved - offload.saved == blocks * one


def test_named_attention_is_estimated_as_the_automatic_choice():
    """flash too, without a GPU: a run on many GPUs may be planned anywhere."""
    named = [config_of(*GRID, f"kernels.attention={name}") for name in ("auto", "flash")]
    chosen, flash = (pass_memory(config, "bf16", 2, CUDA) for config in named)
    assert chosen == flash


def test_the_residual_stream_has_the_same_dtype_under_every_engine():
    saved = {
        engine: pass_memory(config_of(*GRID, f"train.engine={engine}", "train.recompute=full"), "bf16", 8, CUDA).saved
        for engine in ("single", "fsdp2", "deepspeed")
    }
    assert saved["fsdp2"] == pytest.approx(saved["deepspeed"], rel=0.02) and saved["fsdp2"] < 1.1 * saved["single"]


def test_memory_grows_with_samples_and_falls_with_recomputation():
    peaks = {
        recompute: [pass_memory(config_of(f"train.recompute={recompute}", *GRID), "tf32", size, CPU).peak for size in (1, 2, 8)]
        for recompute in ("none", "selective", "full")
    }
    assert all(sizes == sorted(set(sizes)) for sizes in peaks.values())
    assert peaks["none"][2] > peaks["selective"][2] > peaks["full"][2]
    assert pass_memory(config_of(*GRID), "bf16", 8, CPU).peak < peaks["none"][2]


def test_cached_estimates_are_not_mixed_up(monkeypatch):
    """Each measurement gets its own number."""
    measured = []

    def measure(*which):
        measured.append(which)
        return PassMemory(*[len(measured)] * 3)

    monkeypatch.setattr(passes, "pass_memory", measure)
    found_by = pass_estimator.__wrapped__()

    def found(*words: str, mode: str = "bf16", samples: int = 1) -> PassMemory:
        return found_by(config_of(*GRID, *words), mode, samples, CUDA)

    changes = [f"train.recompute={mode}" for mode in ("none", "selective", "full", "offload")]
    changes += ["train.engine=fsdp2", "train.engine=deepspeed", "kernels.compile=true", "model.dropout=0.1"]
    known = [*map(found, changes), found(mode="tf32"), found(samples=8)]
    assert len({*known}) == len(known) and len(measured) == 2 * len(known)
    assert [*map(found, changes)] == known[: len(changes)]
    assert found("train.engine=fsdp2", mode="tf32") == found(mode="tf32")  # where no engine gathers in 16 bits
    assert len(measured) == 2 * len(known)


def test_a_network_of_a_billion_weights_is_estimated_without_allocating_them():
    config = config_of(*(f"model.{key}={value}" for key, value in model_values("xar_h").items()), *GRID)
    none = pass_memory(config, "tf32", 64, CPU)
    assert 80e9 < none.saved < none.peak < 95e9
