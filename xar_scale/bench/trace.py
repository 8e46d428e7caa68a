"""A profile of some work: the longest operations, and how much communication overlaps with compute."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TOP = 10
Span = tuple[int, int]  # nanoseconds: begin, end


class Trace(NamedTuple):
    """``top``: name, self time in ms, calls. Seconds of communication, and the part of them that overlaps with compute."""

    top: list[tuple[str, float, int]]
    communication_s: float
    hidden_s: float


def trace(work: Callable[[], Any], device: torch.device, save: Path | None = None) -> Trace:
    """Profile one call: on a GPU its kernels, otherwise PyTorch's and gloo's operations in this process."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    if save is not None:
        seen.export_chrome_trace(str(save))
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    # user annotations are not kernels, on a GPU either; gloo's collectives appear only as annotations
    every = [event for event in seen.profiler.kineto_results.events() if event.device_type() == kind]
    events = [event for event in every if event.name().startswith("gloo:") or not event.is_user_annotation()]
    spans = [(event.name(), (event.start_ns(), event.start_ns() + event.duration_ns())) for event in events]
    sent = [span for name, span in spans if name.startswith(("nccl", "gloo:"))]
    sending = {
        event.start_thread_id() for event in events if event.name().startswith("gloo:")
    }  # threads of gloo, which also copy
    apart = zip(events, spans, strict=True)
    computed = [
        span
        for event, (name, span) in apart
        if (cuda or (name.startswith("aten::") and event.start_thread_id() not in sending)) and not _moves(name)
    ]
    rows = [row for row in seen.key_averages() if row.device_type == kind and not row.is_user_annotation]
    own = {row.key: (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e3 for row in rows}
    counts = {row.key: row.count for row in rows}
    top = [(name, own[name], counts[name]) for name in sorted(own, key=own.__getitem__, reverse=True)[:TOP]]
    return Trace(top, union_length(sent) / 1e9, overlap_length(sent, computed) / 1e9)


def _moves(name: str) -> bool:
    return name.startswith(("nccl", "gloo:", "Memcpy", "Memset"))


def union_length(spans: Sequence[Span]) -> int:
    """Length of the union of ``spans``."""
    return sum(end - begin for begin, end in _merged(spans))


def overlap_length(left: Sequence[Span], right: Sequence[Span]) -> int:
    """Length of the intersection of the two unions."""
    return union_length(left) + union_length(right) - union_length([*left, *right])


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged
