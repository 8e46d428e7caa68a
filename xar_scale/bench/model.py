"""Parts of the model: each attention backend, each mode of activation checkpointing, building one rank's shards."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from xar_scale import dist
from xar_scale.bench.fake_group import join_fake_group
from xar_scale.bench.memory import peak_memory, resident
from xar_scale.bench.setup import config_with
from xar_scale.bench.timing import median_ms
from xar_scale.config import ModelConfig, Recompute
from xar_scale.engines import create_engine
from xar_scale.errors import ConfigError, UsageError, XarScaleError
from xar_scale.flow import velocity_loss
from xar_scale.model.attention import FLASH_DTYPES, Backend, block_causal_attention, choose_backend, describe
from xar_scale.model.entities import EntityLayout, create_layout, kinds
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import Weight, create_model, initial_weights, meta_model
from xar_scale.precision import MODES, autocast
from xar_scale.presets import model_values
from xar_scale.validation import validated


def _config(options: argparse.Namespace, entity: str) -> ModelConfig:
    sizes = {**model_values(options.model), "grid": [options.grid] * 2, "entity": entity}
    return validated(ModelConfig, sizes, ConfigError)


def _title(options: argparse.Namespace, columns: str) -> None:
    grid = f"{options.grid}x{options.grid} tokens"
    print(f"{options.model}, {grid}, batch {options.batch}, {options.precision}, {dist.local_device()}\n")
    print(f"| {columns} |\n|{' --- |' * (columns.count('|') + 1)}")


def bench_attention(options: argparse.Namespace) -> None:
    """Time one layer's attention with every backend; the one that training would choose is marked."""
    device, dtype = dist.local_device(), MODES[options.precision].compute
    _title(options, "entity | K | backend | forward ms | forward + backward ms")
    for entity in [options.entity] if options.entity else kinds():
        config = _config(options, entity)
        layout = create_layout(config)
        shape = (options.batch, config.heads, layout.tokens, config.head_width)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
        chosen = choose_backend(layout, device, dtype, config.head_width, dropout=options.dropout, backward=True)
        for backend in get_args(Backend):
            if backend == "flash" and dtype not in FLASH_DTYPES:
                continue  # it would fall back to masked, which is listed
            name = describe(backend, device, dtype, config.head_width) + (", chosen" if backend == chosen else "")
            forward = partial(block_causal_attention, q, k, v, layout, backend=backend)
            both = partial(_backward, layout, backend, options.dropout, q, k, v)
            times = f"{_ms_or_reason(forward, device)} | {_ms_or_reason(both, device)}"
            print(f"| {entity} | {layout.entities} | {name} | {times} |", flush=True)


def _backward(layout: EntityLayout, backend: Backend, dropout: float, *qkv: Tensor) -> None:
    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv)
    torch.autograd.grad(block_causal_attention(q, k, v, layout, backend=backend, dropout=dropout).sum(), (q, k, v))


def _ms_or_reason(work: Callable[[], object], device: torch.device) -> str:
    """Return the milliseconds, or the reason if the backend refuses."""
    try:
        return f"{median_ms(work, device):.2f}"
    except ConfigError as refused:
        return str(refused)


def bench_recompute(options: argparse.Namespace) -> None:
    """Time and peak memory of a whole network's loss and gradients. Each mode runs in its own process: on a CPU, what one has
    freed may stay resident, and the next would fill it again before its peak grows."""
    if options.mode:
        print(json.dumps(_one_mode(options)))
        return
    _title(options, "recompute | ms per micro-batch | peak memory of the micro-batch, MB")
    for mode in get_args(Recompute):
        done = subprocess.run([sys.executable, *sys.argv, "--mode", mode], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no output, as when it is killed for lack of memory"]
            failed = XarScaleError(f"mode {mode} exited with code {done.returncode}: {said[-1]}")
            failed.exit_code = max(done.returncode, 1)  # a signal's is negative
            raise failed
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {mode} | {found['ms']:.0f} | {found['peak_mb']:.0f} |", flush=True)


def _one_mode(options: argparse.Namespace) -> dict[str, float]:
    """Measure one mode. The peak is above the weights and gradients, which exist before. On a CPU it is of the resident set, so
    "offload", whose host memory is the same memory, saves nothing there."""
    device, compute = dist.local_device(), MODES[options.precision].compute
    config = _config(options, options.entity or "cell")
    model = create_model(options.model, entity=config.entity, grid=config.grid).to(device)
    apply_recompute(model.blocks, options.mode)
    layout = model.layout
    latents = torch.randn(options.batch, config.channels, *config.grid, device=device)
    noise = torch.randn(options.batch, layout.tokens, config.channels, device=device)
    t = torch.rand(options.batch, layout.entities, device=device)
    labels = torch.zeros(options.batch, dtype=torch.int64, device=device)

    def work() -> None:
        with autocast(device, compute):
            loss = velocity_loss(model, layout, latents, noise, t, labels)
        loss.backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = peak_memory(device, reset=True)
    work()
    peak = peak_memory(device) - before
    return {"ms": median_ms(work, device), "peak_mb": peak / 2**20}


def bench_build(options: argparse.Namespace) -> None:
    """Time and memory to build one ZeRO-3 rank of many until it has its weights."""
    if options.ranks < 1:
        raise UsageError("--ranks must be at least 1")
    join_fake_group(options.ranks)
    config = config_with(options.model, train={"global_batch": options.ranks, "precision": "fp32"})
    model, seen = meta_model(config.model), list[int]()

    def watched() -> Iterator[Weight]:
        for weight in initial_weights(model, seed=0):
            seen.append(resident())
            yield weight
        seen.append(resident())

    whole, begun = sum(parameter.numel() * 4 for parameter in model.parameters()), time.perf_counter()
    engine = create_engine(model, watched(), config, torch.device("cpu"))
    shards = sum(shard.stop - shard.start for shard in engine.shards()) * 4
    print(f"{options.model}: {whole / 1e9:.2f} GB of float32 weights, one rank of {options.ranks} keeps {shards / 1e9:.2f} GB")
    print(f"resident memory grew by {(max(seen) - seen[0]) / 1e9:.2f} GB at most while they were created and sharded")
    print(f"{time.perf_counter() - begun:.0f} s until the engine was ready")
