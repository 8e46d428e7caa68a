"""A plan as text: its tables, its assumptions, and the chosen configuration."""

import dataclasses
from itertools import dropwhile, takewhile

from xar_scale.config import micro_batches
from xar_scale.memory.rank import MARGIN, RankMemory
from xar_scale.model.flops import forward_flops, training_flops
from xar_scale.plan.cost import (
    REPLICATED_LAUNCH_FACTOR,
    checkpoint,
    link_of,
    optimizer_bytes,
    recompute_launch_factor,
    sample_bytes,
    snapshot_bytes,
)
from xar_scale.plan.hardware import Machines
from xar_scale.plan.search import ENGINES, RECOMPUTE, TIME_TOLERANCE, Candidate, FeasibleCandidate, Search
from xar_scale.precision import MODES
from xar_scale.presets import IMAGENET_IMAGES
from xar_scale.tables import aligned


def describe(found: Search, model: str, gpu: str) -> str:
    """Return the whole plan, at most 120 columns wide."""
    best = found.best
    sections = [
        _model(found, model, gpu),
        _memory(found, best),
        _communication(best),
        _step(found, best),
        _outside(found, best),
    ]
    return "\n\n".join([*sections, _assumptions(found, best), _chosen(found)])


def _model(found: Search, model: str, gpu: str) -> str:
    config, machines = found.config, found.machines
    sizes, train = config.model, config.train
    images = train.steps * train.global_batch
    rows = [
        ("parameters", f"{found.weights.total:,} in {found.weights.blocks} blocks of {found.weights.block:,}"),
        ("entities", f"{sizes.entity} on {sizes.grid[0]}x{sizes.grid[1]} tokens"),
        ("TFLOP per image", f"{forward_flops(sizes) / 1e12:.2f} forward, {training_flops(sizes) / 1e12:.2f} in training"),
        ("GPUs", f"{machines.gpus} x {gpu}, {min(machines.gpus, machines.per_node)} per node"),
        ("global batch", f"{train.global_batch:,}, {train.steps:,} steps in {train.precision}"),
        ("images trained on", f"{images:,} ({images / IMAGENET_IMAGES:,.1f} epochs of ImageNet)"),
    ]
    return aligned((model, ""), rows)


def _memory(found: Search, best: FeasibleCandidate) -> str:
    """Memory of the chosen engine at the chosen micro-batch, and the largest micro-batch that fits. One row for each mode of
    recomputation, in the run's precision and in the one the guard falls back to."""
    train = best.config.train
    samples, _ = micro_batches(train, found.machines.gpus)
    fallback = MODES[train.precision].fallback
    modes = [train.precision, *([fallback] if fallback and found.config.guard.enabled else [])]
    titles = ("GB per GPU", *("EMA" if part == "ema" else part for part in RankMemory._fields), "needed", "max batch")
    rows = []
    for mode in modes:
        for recompute in RECOMPUTE:
            config = dataclasses.replace(best.config, train=dataclasses.replace(train, recompute=recompute))
            memory, largest = found.memory(config, mode, samples), found.largest(config, mode)
            row = [f"{mode}, {recompute}", *map(_gb, memory), _gb(memory.total), str(largest or "none")]
            rows.append(row)
    used = [n for n, title in enumerate(titles) if title == titles[-1] or any(row[n] != "0" for row in rows)]
    return aligned([titles[n] for n in used], [[row[n] for n in used] for row in rows])


def _communication(best: FeasibleCandidate) -> str:
    if not best.collectives:
        return "communication: none"
    rows = [
        (each.name, str(each.ranks), str(each.calls), _gb(each.bytes_sent), f"{each.seconds * 1e3:.1f}")
        for each in best.collectives
    ]
    sent = sum(each.bytes_sent for each in best.collectives)
    rows.append(("total", "", "", _gb(sent), f"{best.time.communication * 1e3:.1f}"))
    return aligned(("communication per step", "ranks", "calls", "GB sent per GPU", "ms"), rows)


def _step(found: Search, best: FeasibleCandidate) -> str:
    time, train = best.time, best.config.train
    hours = time.total * train.steps / 3600
    rows = [("compute", f"{_ms(time.compute)} ms")]
    if best.collectives and not train.replicated_weights:
        rows += [("communication (overlapped)", f"{_ms(time.communication - time.exposed)} ms")]
    if time.offload:
        rows += [("activation offload (overlapped)", f"{_ms(time.offload)} ms")]
    if time.launches:
        rows += [("kernel launches (overlapped)", f"{_ms(time.launches)} ms")]
    if best.collectives:
        which = "all of it" if train.replicated_weights else "the first all-gather and the last reduction"
        rows += [("communication (exposed)", f"{_ms(time.exposed)} ms: {which}")]
    rows += [("optimizer", f"{_ms(time.optimizer)} ms"), ("data loading", f"{_ms(time.data)} ms, overlapped with the step")]
    exposed = [time.exposed] if best.collectives else []
    parts = " + ".join(map(_ms, [time.overlapped, *exposed, time.optimizer]))
    rows += [
        (
            "step",
            f"{_ms(time.total)} ms, bound by data loading" if time.total == time.data else f"{parts} = {_ms(time.total)} ms",
        ),
        (
            "images/s",
            f"{train.global_batch / time.total:,.0f} ({train.global_batch / time.total / found.machines.gpus:,.1f} per GPU)",
        ),
        ("whole run", f"{hours:,.1f} hours, {hours * found.machines.gpus:,.0f} GPU-hours"),
    ]
    return aligned(("time per step", ""), rows)


def _outside(found: Search, best: FeasibleCandidate) -> str:
    config, machines, weights = best.config, found.machines, found.weights
    kept, train = checkpoint(config, weights, machines), config.train
    of_node = train.global_batch / best.time.total / machines.gpus * min(machines.per_node, machines.gpus)
    rows = [
        ("checkpoint", f"{kept.size / 1e9:,.1f} GB: {kept.copy:.2f} s to copy to host memory, {kept.write:,.0f} s to write"),
        (
            "host memory per node",
            f"{snapshot_bytes(config, weights, machines) / 1e9:,.1f} GB for the guard's snapshots and a copy of the checkpoint",
        ),
        ("data per node", f"{of_node:,.0f} samples/s, {of_node * sample_bytes(config) / 1e6:,.1f} MB/s"),
    ]
    return aligned(("outside the GPUs", ""), rows)


def _assumptions(found: Search, best: FeasibleCandidate) -> str:
    machines, gpu = found.machines, found.machines.gpu
    data, peak = best.config.data, gpu.peak(best.config.train.precision) / 1e12
    lines = [
        f"memory: {gpu.memory / 1e9:.0f} GB per GPU; {MARGIN - 1:.0%} added to the estimate for CUDA, NCCL and fragmentation",
        "memory: peak of a step, in a micro-batch or in the optimizer step; attention and dropout are fused kernels",
        f"compute: {machines.mfu:.0%} of the peak of {peak:,.0f} TFLOP/s, recomputation included, at any micro-batch (--mfu)",
        *([_assumed_of_launches(machines, best)] if best.time.launches else []),
        *(_assumed_of_links(machines, best) if best.collectives else []),
        f"optimizer: {optimizer_bytes(best.config, found.weights, machines.gpus) / 1e9:.2f} GB read and written per GPU at "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s; host link {gpu.host_link / 1e9:.0f} GB/s",
        f"data: {machines.loader:,.0f} samples/s per core, {max(data.workers, 1)} workers per GPU (data.workers)",
        f"checkpoint: float32, {machines.disk / 1e9:.0f} GB/s per node to disk, written while training continues",
        "not included: restarts, evaluation, previews, warm-up of the first steps",
    ]
    return "\n".join(["assumptions", *(f"  {line}" for line in lines)])


def _assumed_of_launches(machines: Machines, best: FeasibleCandidate) -> str:
    replicated = f" x {REPLICATED_LAUNCH_FACTOR:g} (nothing to gather)" if best.config.train.replicated_weights else ""
    recompute = f" x {factor:g} (recomputation)" if (factor := recompute_launch_factor(best.config)) > 1 else ""
    factors = f"{machines.launch * 1e3:g} ms{replicated}{recompute}"
    return f"launches: {factors} of CPU time per block and micro-batch (--launch); eager blocks take longer"


def _assumed_of_links(machines: Machines, best: FeasibleCandidate) -> list[str]:
    gpu, reached = machines.gpu, f"collectives reach {machines.link_share:.0%}"
    near = f"{link_of(machines, 1).hop * 1e6:g} us"
    links = [f"network: NVLink {gpu.nvlink / 1e9:.0f} GB/s; {reached}; {near} per hop"]
    if machines.nodes > 1:
        links = [
            f"network: {gpu.network / 1e9:g} GB/s per GPU between nodes (--network), NVLink {gpu.nvlink / 1e9:.0f} GB/s "
            f"within a node; {reached}",
            f"nodes: {machines.per_node} GPUs each (--gpus-per-node), one ring through each network adapter; "
            f"{machines.hop * 1e6:g} us per hop between nodes, {near} within",
        ]
    overlap = (
        "no communication overlaps with compute"
        if best.config.train.replicated_weights
        else "all collectives of a step but the first and the last overlap with compute"
    )
    return [*links, f"overlap: {overlap}; no rank waits for a slower one"]


def _chosen(found: Search) -> str:
    best, train = found.best, found.config.train
    lines = [f"chosen: {best.name}", f"  {_why(found, best)}"]
    if MODES[train.precision].fallback and found.config.guard.enabled:
        split = "unsplit" if best.parts == 1 else f"in {best.parts} parts"
        lines.append(f"  after a fallback to TF32 each micro-batch runs {split}")
    if other := _runner_up(found):
        lines.append(f"runner-up: {other.name}: {other.time.total * 1e3:,.1f} ms per step, {_gb(other.memory.total)} GB")
    return "\n".join(lines)


def _why(found: Search, best: FeasibleCandidate) -> str:
    time = best.time
    communication = max(time.communication - time.exposed, time.exposed)  # overlapped with the rest, or not
    parts = {"compute": time.compute, "communication": communication, "activation offload": time.offload}
    parts["kernel launches"] = time.launches
    bound = "data loading" if time.total == time.data else max(parts, key=parts.__getitem__)
    # whether these fit is not checked: that would take as long as the rest of the plan
    after = dropwhile(lambda candidate: candidate.config is not best.config, found.candidates)
    same = [candidate.config for candidate in takewhile(lambda candidate: candidate.time_bucket == best.time_bucket, after)]
    compiled, engines = {each.kernels.compile for each in same}, {each.train.engine for each in same}
    then = ""
    if len(compiled) > 1:
        then = ", compiled blocks"
    elif len(engines) > 1:
        then = f", {ENGINES[best.config.train.engine]}"
    order = f"least recomputation{then}, largest micro-batch"
    others = f"{len(same) - 1} other{'s' if len(same) > 2 else ''}"
    found_best = f"the fewest GPU-hours of the candidates that fit, of {len(found.candidates)} considered"
    tied = f"tied within {TIME_TOLERANCE:.0%} with {others} (memory not checked); tie-breakers: {order}"
    bound_by = f"bound by {bound}; needs {_gb(best.memory.total)} of {_gb(found.gpu_memory)} GB"
    return "\n  ".join([found_best, *([tied] if len(same) > 1 else []), bound_by])


def _runner_up(found: Search) -> FeasibleCandidate | None:
    """Return the next best with another engine or sharding group, else with another mode of recomputation, else None."""

    def kind(candidate: Candidate) -> tuple[str, int | None]:
        return candidate.config.train.engine, candidate.config.train.shard_ranks

    best = found.best
    by_kind = (candidate for candidate in found.feasible() if kind(candidate) != kind(best))
    by_recompute = (
        candidate for candidate in found.feasible() if candidate.config.train.recompute != best.config.train.recompute
    )
    return next(by_kind, None) or next(by_recompute, None)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _gb(size: float) -> str:
    return "0" if not size else f"{size / 1e9:.2f}" if size < 10e9 else f"{size / 1e9:.1f}"
