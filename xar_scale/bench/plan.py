"""The plan's estimates against measurements: memory of a rank, and time of a step on several ranks."""

import argparse
import dataclasses
import os
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from xar_scale import dist
from xar_scale.bench.fake_group import join_fake_group
from xar_scale.bench.memory import peak_memory, peak_resident
from xar_scale.bench.setup import config_with, engine_and_ema
from xar_scale.bench.timing import median_ms
from xar_scale.config import Config
from xar_scale.data.loader import Batch
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.flow import velocity_loss
from xar_scale.memory.rank import rank_memory, weights_of
from xar_scale.model.flops import training_flops
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import blank_weights, meta_model
from xar_scale.optim import create_adamw
from xar_scale.plan.cost import Collective, Link, optimizer_bytes, step_collectives, step_time
from xar_scale.plan.hardware import GPU, Machines
from xar_scale.precision import MODES, autocast

STEPS = 2  # the second finds what the first allocates once


def config_of(options: argparse.Namespace, world: int) -> Config:
    """Return imagenet256_h's config with the requested model, engine and sizes; no dropout, as a CPU keeps float32 masks."""
    train = {name: getattr(options, name) for name in ("engine", "precision", "recompute", "shard_ranks")}
    train |= {"global_batch": world * options.batch, "micro_batch": options.batch}
    return config_with(options.model, model={"dropout": 0.0}, train=train)


def measured_memory(config: Config, device: torch.device) -> int:
    """Return the peak bytes allocated by PyTorch on ``device``, from before the engine is built to the end of a few steps.

    Only allocated tensors count: fragmentation, libraries, and gloo's and NCCL's buffers do not.
    """
    if device.type == "cuda":
        before = peak_memory(device, reset=True)
        train_steps(config, device)
        return peak_memory(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = train_steps(config, device)
    del kept
    level = highest = 0
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def train_steps(config: Config, device: torch.device) -> tuple[Engine, EMA]:
    """Return an engine and its EMA after a few steps of one micro-batch each, on zeros."""
    engine, ema, _ = engine_and_ema(config, blank_weights, device)
    for step in range(STEPS):
        batch = Batch.zeros(engine.layout, config.model.channels, config.train.micro_batch or 1, device)
        verdict = engine.attempt(step, [batch])
        engine.step(1e-4, verdict)
        ema.update(step + 1)
    return engine, ema


def bench_memory(options: argparse.Namespace) -> None:
    """Compare estimated and measured memory of one rank's training steps: in one process, under a launcher, or as rank 0 of a
    fake group of ``--ranks``."""
    device = dist.local_device()
    if options.ranks:
        join_fake_group(options.ranks)
    elif options.engine != "single":
        dist.init(device)
    config = config_of(options, dist.world())
    needed = rank_memory(config, options.precision, options.batch, dist.world(), device)
    before = peak_resident(reset=True)
    measured = measured_memory(config, device)
    grown = peak_resident() - before
    dist.say(
        f"{options.model}, {options.engine}, {options.precision}, recompute {options.recompute}, batch {options.batch}, "
        f"rank 0 of {dist.world()} on {device}\n"
    )
    dist.say("| part | GB |\n| --- | --- |")
    for part, size in needed._asdict().items():
        dist.say(f"| {part} | {size / 1e9:.3f} |")
    dist.say(f"| estimated | {sum(needed) / 1e9:.3f} |")
    dist.say(f"| measured: allocator | {measured / 1e9:.3f} ({sum(needed) / measured - 1:+.1%}) |")
    if device.type == "cpu":
        dist.say(f"| measured: resident set | {grown / 1e9:.3f} ({sum(needed) / grown - 1:+.1%}) |")


def bench_scaling(options: argparse.Namespace) -> None:
    """Run under a launcher: compare a step predicted from separately measured parts with the measured step.

    The parts are a micro-batch and an optimizer step on unsharded weights, timed on one rank while the others wait and then on
    all ranks at once, and collectives of a block's size. Ranks share the cores: with fewer cores than ranks, the time of one
    rank alone is multiplied by ranks / cores. Communication needs a core too, so no overlap is assumed.
    """
    device, cores = dist.local_device(), len(os.sched_getaffinity(0))
    dist.init(device)
    world = dist.world()
    config = config_of(options, world)
    alone = dist.on_rank_0(lambda: _computed(options, device))
    together = [dist.max_over_ranks(seconds) for seconds in _computed(options, device)]
    weights, shared = weights_of(config.model), max(1.0, world / cores)
    single = dataclasses.replace(config, train=dataclasses.replace(config.train, engine="single"))

    def machines(compute: float, optimizer: float) -> Machines:
        """Return machines whose peak and memory bandwidth give these seconds."""
        peak, read = options.batch * training_flops(config.model) / compute, optimizer_bytes(single, weights, 1) / optimizer
        gpu = GPU(memory=0, bf16=peak, tf32=peak, fp32=peak, memory_bandwidth=read, nvlink=1, host_link=1, network=1)
        return Machines(gpu, world, world, mfu=1.0, launch=0.0, overlap=0.0, loader=1e12)

    sent = [
        each._replace(link=Link(each.bytes_sent / (each.calls * _collective_seconds(each, device)), 0.0))
        for each in step_collectives(config, weights, machines(*alone))
    ]
    measured = _step_seconds(config, device)
    shape = f"batch {options.batch} per rank, {world} ranks on {cores} cores"
    dist.say(f"{options.model}, {options.engine}, {options.precision}, {shape}\n")
    dist.say(f"| source of compute | compute | communication | optimizer | predicted | measured, ms | error |\n|{' --- |' * 7}")
    for name, seconds in (
        ("one rank alone x ranks / cores", [part * shared for part in alone]),
        ("all ranks at once", together),
    ):
        time = step_time(config, weights, machines(*seconds), sent)
        parts = " | ".join(f"{part * 1e3:.0f}" for part in (time.compute, time.communication, time.optimizer, time.total))
        dist.say(f"| {name} | {parts} | {measured * 1e3:.0f} | {time.total / measured - 1:+.0%} |")


def _computed(options: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a micro-batch, and of an optimizer step with EMA, of unsharded weights in this process alone."""
    config = config_of(options, 1)
    model = meta_model(config.model)
    model.use_kernels(config.kernels, device, MODES[options.precision].compute, training=True)
    apply_recompute(model.blocks, config.train.recompute)
    for weight in blank_weights(model):
        weight.place(device)
    parameters = dict(model.named_parameters())
    optimizer = create_adamw(parameters, {name: weight.shape for name, weight in parameters.items()}, config.optim, device)
    ema = EMA([*parameters.values()], config.optim.ema_decay)
    batch = Batch.zeros(model.layout, config.model.channels, options.batch, device)
    compute = MODES[options.precision].compute

    def computed() -> None:
        optimizer.zero_grad()
        with autocast(device, compute):
            velocity_loss(model, model.layout, batch.latents, batch.noise, batch.t, batch.labels).backward()

    def stepped() -> None:
        gradients = [weight.grad for weight in parameters.values() if weight.grad is not None]
        torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        torch._foreach_mul_(gradients, 0.5)
        optimizer.step()
        ema.update(1)

    return median_ms(computed, device) / 1e3, median_ms(stepped, device) / 1e3


def _collective_seconds(collective: Collective, device: torch.device) -> float:
    """Return the seconds of one call on the slowest rank."""
    part = -(-int(collective.size / 4 / collective.calls) // collective.ranks)
    piece, whole = torch.zeros(part, device=device), torch.zeros(part * collective.ranks, device=device)
    call: Callable[[], object] = (
        partial(dist.reduce_scatter, piece, whole)
        if collective.name == "reduce-scatter"
        else partial(dist.all_gather, whole, piece)
    )
    return dist.max_over_ranks(median_ms(call, device) / 1e3)


def _step_seconds(config: Config, device: torch.device) -> float:
    engine, ema = train_steps(config, device)
    batch = Batch.zeros(engine.layout, config.model.channels, config.train.micro_batch or 1, device)

    def step() -> None:
        engine.step(1e-4, engine.attempt(0, [batch]))
        ema.update(1)

    return dist.max_over_ranks(median_ms(step, device) / 1e3)
