"""Saving and loading a run's state: our checkpoints and DeepSpeed's, for the same model in the same processes."""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xar_scale import dist
from xar_scale.bench.setup import config_with, engine_and_ema
from xar_scale.checkpoint.load import load
from xar_scale.checkpoint.manifest import Manifest, bare_manifest, read_manifest
from xar_scale.checkpoint.store import Store
from xar_scale.config import Config
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.errors import ConfigError
from xar_scale.model.xar import initial_weights

REPEATS = 3


def bench_checkpoint(options: argparse.Namespace) -> None:
    """Run under a launcher, on each rank. Prints medians: seconds of the slowest rank, bytes of all ranks."""
    device = dist.local_device()
    dist.init(device)
    if options.data.exists():
        raise ConfigError(f"{options.data} exists; --data names a folder to create and remove")
    train = {"engine": "deepspeed", "precision": options.precision, "global_batch": dist.world()}
    train["keep_last"] = 2  # so that saves also remove some
    config = config_with(options.model, model={"grid": [options.grid] * 2}, train=train)
    engine, ema, _ = engine_and_ema(config, lambda model: initial_weights(model, 0), device)
    dist.on_rank_0(lambda: options.data.mkdir(parents=True))
    try:
        rows = {"ours": _ours(engine, ema, config, options.data), "DeepSpeed, universal": _theirs(engine, options.data)}
    finally:
        dist.on_rank_0(lambda: shutil.rmtree(options.data, ignore_errors=True))
    dist.say(f"\n{options.model}, ZeRO-3 on {dist.world()} x {device.type}, medians of {REPEATS}\n")
    dist.say("| | training stalls, s | save, s | convert, s | load, s | read by all ranks, GB | on disk, GB |")
    dist.say("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (*seconds, read, size) in rows.items():
        dist.say(f"| {name} | {' | '.join(f'{value:.2f}' for value in seconds)} | {read / 1e9:.2f} | {size / 1e9:.2f} |")


def _ours(engine: Engine, ema: EMA, config: Config, folder: Path) -> tuple[float, ...]:
    store = Store(folder / "ours", engine, ema, config.train)
    dist.on_rank_0(lambda: store.open(0))
    waits, saves = [], []
    for step in range(1, REPEATS + 2):  # the first is a warm-up
        before = store.stall_s
        manifest = bare_manifest(
            step=step, world=dist.world(), shapes={key: list(shape) for key, shape in engine.shapes.items()}
        )
        saves.append(_slowest(lambda manifest=manifest: _saved(store, manifest)))  # type: ignore[misc]
        waits.append(dist.max_over_ranks(store.stall_s - before))
    assert store.newest is not None
    checkpoint = read_manifest(store.newest)
    loads, read = _loads(lambda: load(checkpoint, engine, ema))
    return statistics.median(waits[1:]), statistics.median(saves[1:]), 0.0, loads, read, checkpoint.manifest.bytes


def _saved(store: Store, manifest: Manifest) -> None:
    store.save(manifest)
    store.finish()


def _theirs(engine: Any, folder: Path) -> tuple[float, ...]:
    """DeepSpeed's save blocks. Loading on another number of ranks needs one conversion."""
    own, universal = folder / "zero", folder / "universal"
    saves = []
    for step in range(REPEATS):
        saves.append(_slowest(lambda step=step: engine.engine.save_checkpoint(str(own), tag=f"step{step}")))  # type: ignore[misc]
        if step:
            dist.on_rank_0(lambda step=step: shutil.rmtree(own / f"step{step - 1}"))  # type: ignore[misc]
    source, target = own / f"step{REPEATS - 1}", universal / "step"

    def convert() -> None:
        if dist.rank() == 0:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
            command += ["--input_folder", str(source), "--output_folder", str(target)]
            subprocess.run(command, check=True, capture_output=True)

    converted = _slowest(convert)
    loads, read = _loads(lambda: engine.load_universal(str(universal), "step"))
    size = sum(path.stat().st_size for path in universal.rglob("*") if path.is_file())
    return statistics.median(saves), statistics.median(saves), converted, loads, read, size


def _loads(work: Callable[[], Any]) -> tuple[float, int]:
    """Return the seconds, and the bytes that all ranks read through system calls."""
    before = _bytes_read()
    seconds = statistics.median(_slowest(work) for _ in range(REPEATS))
    return seconds, sum(dist.gather_objects((_bytes_read() - before) // REPEATS))


def _bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _slowest(work: Callable[[], Any]) -> float:
    dist.gather_objects(None)  # a barrier: all start together
    begun = time.perf_counter()
    work()
    return dist.max_over_ranks(time.perf_counter() - begun)
