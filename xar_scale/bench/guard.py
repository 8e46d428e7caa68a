"""Overhead of the guard in a step without faults."""

import argparse
from pathlib import Path

from xar_scale import dist
from xar_scale.bench.setup import config_with, engine_and_ema
from xar_scale.bench.timing import median_ms
from xar_scale.checkpoint.store import Store
from xar_scale.data.loader import Batch
from xar_scale.engines.base import finite_if_all_are
from xar_scale.guard import GuardState
from xar_scale.model.xar import initial_weights
from xar_scale.recovery import Recovery


def bench_guard(options: argparse.Namespace) -> None:
    """Print the median time of each part of the guard, and its share of the step."""
    model = {"grid": [options.grid] * 2, "dropout": 0.0}
    train = {"engine": "single", "precision": options.precision, "global_batch": options.batch}
    config = config_with(options.model, model=model, train=train)
    device = dist.local_device()
    engine, ema, kernels = engine_and_ema(config, lambda model: initial_weights(model, 0), device)
    recovery = Recovery(config, engine, ema, ["shard"], Store(Path("none"), engine, ema, config.train), GuardState())
    batch = Batch.zeros(engine.layout, config.model.channels, options.batch, device)
    masters = [shard.master for shard in engine.shards()]

    def step() -> None:
        _, verdict = recovery.resolve(0, [batch], recovery.attempt(0, [batch]))
        engine.step(1e-4, verdict)
        ema.update(1)

    verdict = recovery.attempt(0, [batch])
    whole = median_ms(step, device)
    every = config.guard.snapshot_every
    parts: dict[str, float] = {
        "check weights": median_ms(lambda: finite_if_all_are(masters), device),
        "check inputs": median_ms(batch.inputs_sum, device),
        "decide": median_ms(lambda: recovery.resolve(0, [batch], verdict), device),
        f"check the whole state, every {every} steps": median_ms(lambda: engine.ranks_with_bad_state(ema.tensors), device)
        / every,
        f"take a snapshot, every {every} steps": median_ms(lambda: recovery.snapshots.take(0, recovery.state), device) / every,
    }
    sizes = f"{options.model}, {options.grid}x{options.grid} tokens, batch {options.batch}, {options.precision}"
    print(f"{sizes}, {device}; {kernels}\n")
    print("| part | ms per step | share of the step |\n| --- | --- | --- |")
    for name, ms in parts.items():
        print(f"| {name} | {ms:.3f} | {ms / whole:.3%} |")
    print(f"| the guard | {sum(parts.values()):.3f} | {sum(parts.values()) / whole:.3%} |\n| the step | {whole:.1f} | |")
