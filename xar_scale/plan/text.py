"""A plan as text: tables, the assumptions behind them, and the choice."""

import dataclasses
from itertools import dropwhile, takewhile

from xar_scale.config import micro_batches
from xar_scale.doctor import table
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


def describe(found: Search, model: str, gpu: str) -> str:
    """All of it, at most 120 columns wide."""
    best = found.best
    sections = [_model(found, model, gpu), _memory(found, best), _communication(best), _step(found, best), _kept(found, best)]
    return "\n\n".join([*sections, _assumed(found, best), _chosen(found)])


def _model(found: Search, model: str, gpu: str) -> str:
    config, machines = found.config, found.machines
    sizes, train = config.model, config.train
    images = train.steps * train.global_batch
    rows = [
        ("parameters", f"{found.weights.total:,} in {found.weights.blocks} blocks of {found.weights.block:,}"),
        ("entities", f"{sizes.entity} on {sizes.grid[0]}x{sizes.grid[1]} tokens"),
        ("TFLOP an image", f"{forward_flops(sizes) / 1e12:.2f} forward, {training_flops(sizes) / 1e12:.2f} in training"),
        ("GPUs", f"{machines.gpus} x {gpu}, {min(machines.gpus, machines.per_node)} a node"),
        ("global batch", f"{train.global_batch:,}, {train.steps:,} steps in {train.precision}"),
        ("images trained on", f"{images:,}, {images / IMAGENET_IMAGES:,.1f} times ImageNet"),
    ]
    return table((model, ""), rows)


def _memory(found: Search, best: FeasibleCandidate) -> str:
    """With the chosen engine, at its micro batch; beside it the largest that fits. In the run's precision, and after the
    fallback."""
    train = best.config.train
    samples, _ = micro_batches(train, found.machines.gpus)
    fallback = MODES[train.precision].fallback
    modes = [train.precision, *([fallback] if fallback and found.config.guard.enabled else [])]
    titles = ("GB a GPU", *RankMemory._fields, "needed", "largest batch")
    rows = []
    for mode in modes:
        for recompute in RECOMPUTE:
            config = dataclasses.replace(best.config, train=dataclasses.replace(train, recompute=recompute))
            memory, largest = found.memory(config, mode, samples), found.largest(config, mode)
            row = [f"{mode}, {recompute}", *map(_gb, memory), _gb(memory.total), str(largest or "none fits")]
            rows.append(row)
    used = [n for n, title in enumerate(titles) if title == titles[-1] or any(row[n] != "0" for row in rows)]
    return table([titles[n] for n in used], [[row[n] for n in used] for row in rows])


def _communication(best: FeasibleCandidate) -> str:
    if not best.collectives:
        return "communication: none"
    rows = [
        (each.name, str(each.ranks), str(each.calls), _gb(each.bytes_sent), f"{each.seconds * 1e3:.1f}")
        for each in best.collectives
    ]
    sent = sum(each.bytes_sent for each in best.collectives)
    rows.append(("all", "", "", _gb(sent), f"{best.time.communication * 1e3:.1f}"))
    return table(("communication a step", "ranks", "calls", "GB sent a GPU", "ms"), rows)


def _step(found: Search, best: FeasibleCandidate) -> str:
    time, train = best.time, best.config.train
    hours = time.total * train.steps / 3600
    rows = [("compute", f"{_ms(time.compute)} ms")]
    if best.collectives and not train.whole_weights:
        rows += [("communication beside it", f"{_ms(time.communication - time.exposed)} ms")]
    if time.offload:
        rows += [("copies to and from the host beside it", f"{_ms(time.offload)} ms")]
    if time.launches:
        rows += [("launches of the host beside it", f"{_ms(time.launches)} ms")]
    if best.collectives:
        which = "a reduction and a gather" if train.whole_weights else "the first gather and the last reduction"
        rows += [("communication alone", f"{_ms(time.exposed)} ms: {which}")]
    rows += [("optimizer", f"{_ms(time.optimizer)} ms"), ("data for the next, beside all", f"{_ms(time.data)} ms")]
    alone = [time.exposed] if best.collectives else []
    parts = " + ".join(map(_ms, [time.overlapped, *alone, time.optimizer]))
    rows += [
        ("step", f"{_ms(time.total)} ms, the data's" if time.total == time.data else f"{parts} = {_ms(time.total)} ms"),
        (
            "images/s",
            f"{train.global_batch / time.total:,.0f}, {train.global_batch / time.total / found.machines.gpus:,.1f} a GPU",
        ),
        ("the recipe", f"{hours:,.1f} hours, {hours * found.machines.gpus:,.0f} GPU-hours"),
    ]
    return table(("a step", ""), rows)


def _kept(found: Search, best: FeasibleCandidate) -> str:
    config, machines, weights = best.config, found.machines, found.weights
    kept, train = checkpoint(config, weights, machines), config.train
    of_node = train.global_batch / best.time.total / machines.gpus * min(machines.per_node, machines.gpus)
    rows = [
        ("checkpoint", f"{kept.size / 1e9:,.1f} GB; {kept.copy:.2f} s to copy to the host, {kept.write:,.0f} s to write"),
        (
            "host memory a node",
            f"{snapshot_bytes(config, weights, machines) / 1e9:,.1f} GB of snapshots and a checkpoint's copy",
        ),
        ("data a node", f"{of_node:,.0f} samples/s, {of_node * sample_bytes(config) / 1e6:,.1f} MB/s"),
    ]
    return table(("beside the GPUs", ""), rows)


def _assumed(found: Search, best: FeasibleCandidate) -> str:
    machines, gpu = found.machines, found.machines.gpu
    data, peak = best.config.data, gpu.peak(best.config.train.precision) / 1e12
    lines = [
        f"memory: {gpu.memory / 1e9:.0f} GB a GPU; {MARGIN - 1:.0%} of what is reckoned is added for CUDA, NCCL and fragments",
        "memory: the moment of a step that needs most, a pass or the optimizer's step; attention and dropout as fused kernels",
        f"compute: {machines.mfu:.0%} of {peak:,.0f} TFLOP/s, recomputed work included, at any micro batch (--mfu)",
        *([_assumed_of_launches(machines, best)] if best.time.launches else []),
        *(_assumed_of_links(machines, best) if best.collectives else []),
        f"optimizer: {optimizer_bytes(best.config, found.weights, machines.gpus) / 1e9:.2f} GB read and written a GPU at "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s; host link {gpu.host_link / 1e9:.0f} GB/s",
        f"data: {machines.loader:,.0f} samples/s a core, {max(data.workers, 1)} workers a GPU (data.workers)",
        f"checkpoint: float32, {machines.disk / 1e9:.0f} GB/s a node to disk; it is written while training goes on",
        "not in it: restarts, evaluation, previews, the first steps' warm-up",
    ]
    return "\n".join(["assumed", *(f"  {line}" for line in lines)])


def _assumed_of_launches(machines: Machines, best: FeasibleCandidate) -> str:
    whole = f" x {REPLICATED_LAUNCH_FACTOR:g}, with nothing to gather" if best.config.train.whole_weights else ""
    again = f" x {times:g}, to compute again" if (times := recompute_launch_factor(best.config)) > 1 else ""
    return f"launches: {machines.launch * 1e3:g} ms of the host a block and pass (--launch){whole}{again}, of eager ones more"


def _assumed_of_links(machines: Machines, best: FeasibleCandidate) -> list[str]:
    gpu, reached = machines.gpu, f"collectives reach {machines.link_share:.0%}"
    near = f"{link_of(machines, 1).hop * 1e6:g} us"
    links = [f"network: NVLink {gpu.nvlink / 1e9:.0f} GB/s; {reached}, {near} a hop"]
    if machines.nodes > 1:
        links = [
            f"network: {gpu.network / 1e9:g} GB/s a GPU between nodes (--network), NVLink {gpu.nvlink / 1e9:.0f} GB/s in one; "
            f"{reached}, {machines.hop * 1e6:g} us a hop and {near}",
            f"nodes: {machines.per_node} GPUs (--gpus-per-node), a ring through each of their adapters",
        ]
    beside = (
        "none of communication"
        if best.config.train.whole_weights
        else "collectives run beside computation, but for a step's first and last"
    )
    return [*links, f"overlap: {beside}; nothing waits for a slow rank"]


def _chosen(found: Search) -> str:
    best, train = found.best, found.config.train
    lines = [f"chosen: {best.name}", f"  {_why(found, best)}"]
    if MODES[train.precision].fallback and found.config.guard.enabled:
        whole = "whole" if best.parts == 1 else f"in {best.parts} parts"
        lines.append(f"  after a fallback to TF32 a pass runs {whole}")
    if other := _runner_up(found):
        lines.append(f"runner-up: {other.name}: {other.time.total * 1e3:,.1f} ms a step, {_gb(other.memory.total)} GB")
    return "\n".join(lines)


def _why(found: Search, best: FeasibleCandidate) -> str:
    time = best.time
    sent = max(time.communication - time.exposed, time.exposed)  # beside the rest, or alone
    parts = {"compute": time.compute, "communication": sent, "copies to the host": time.offload}
    parts["launches of the host"] = time.launches
    bound = "data" if time.total == time.data else max(parts, key=parts.__getitem__)
    # whether those fit is not asked: to know it would take as long as all else
    after = dropwhile(lambda candidate: candidate.config is not best.config, found.candidates)
    same = [candidate.config for candidate in takewhile(lambda candidate: candidate.time_bucket == best.time_bucket, after)]
    compiled, engines = {each.kernels.compile for each in same}, {each.train.engine for each in same}
    then = ""
    if len(compiled) > 1:
        then = ", then compiled blocks"
    elif len(engines) > 1:
        then = f", then {ENGINES[best.config.train.engine]}"
    order = f"the least recomputation{then}, then the largest micro batch"
    equal = f"\n  before {len(same) - 1} as quick, to {TIME_TOLERANCE:.0%}, that may fit too: {order}"
    among = equal if len(same) > 1 else ""
    return (
        f"the fewest GPU-hours of {len(found.candidates)} candidates, of those that fit{among}\n"
        f"  bound by {bound}; {_gb(best.memory.total)} of {_gb(found.gpu_memory)} GB"
    )


def _runner_up(found: Search) -> FeasibleCandidate | None:
    """The next with another engine or sharing, or where there is none with other recomputation."""

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
