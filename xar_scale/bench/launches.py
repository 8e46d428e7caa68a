"""CPU time to launch the kernels of a micro-batch, whatever its size: the value for ``plan --launch``."""

import argparse
import dataclasses

from xar_scale import dist
from xar_scale.bench.fake_group import join_fake_group
from xar_scale.bench.plan import config_of, train_steps
from xar_scale.bench.timing import median_ms
from xar_scale.config import KernelConfig
from xar_scale.data.loader import Batch

NARROW = {
    "width": 128,
    "heads": 2,
    "grid": (4, 4),
}  # narrow enough for the GPU to finish before the CPU has launched the next kernel


def bench_launches(options: argparse.Namespace) -> None:
    """Time forward and backward of a narrow network with the model's depth, as one rank of a group that sends nothing. On a CPU
    the time includes the little arithmetic that is left."""
    device = dist.local_device()
    ranks = 1 if options.engine == "single" else options.ranks
    join_fake_group(ranks)
    config = config_of(options, ranks)
    model = dataclasses.replace(config.model, **NARROW)  # type: ignore[arg-type]
    engine, _ = train_steps(dataclasses.replace(config, model=model, kernels=KernelConfig(compile=options.compile)), device)
    batch = Batch.zeros(engine.layout, engine.config.model.channels, options.batch, device)
    blocks = len(engine.model.blocks)

    def work() -> None:
        engine.forward_backward(batch)
        engine.discard()

    ms = median_ms(work, device)
    how = f"{options.engine}{', compiled' if options.compile else ''}{', CUDA graphs' if engine.replays_graphs else ''}"
    where = f"{options.model}'s {blocks} blocks, {options.precision}, {how}, rank 0 of {ranks} on {device}"
    dist.say(f"{where}: {ms:.1f} ms per micro-batch, {ms / blocks:.2f} per block")
