"""Finds slow ranks. A step takes equally long on all ranks: what differs is how long the layers compute, not counting waits for
other ranks, and how long the rank waits for data."""

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from xar_scale import dist
from xar_scale.model.layers import Block

SLOW = 1.3  # a rank is slow at this many times the median compute time, or if its wait for data stretches the step by this
CONSECUTIVE = 3  # slow measurements in a row before the rank is reported


class SpanTimer:
    """Sums the duration of spans without synchronizing with the device (CUDA events on a GPU)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begun: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []

    def _begin(self, *_: Any) -> None:
        self._begun.append(self._now())

    def _end(self, *_: Any) -> None:
        self._spans.append((self._begun[-1], self._now()))  # recomputation may stop early, so a span may have no end

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def seconds(self) -> float:
        """Total seconds. On a GPU, read this only after the device has reached every event."""
        if self.device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        return sum(end - begin for begin, end in self._spans)


class PassTime(SpanTimer):
    """Measures the time spent in the context, over all entries: for forward-backward passes without communication."""

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


class ForwardTime(SpanTimer):
    """Measures the forward time of a network's Linear layers while the context is open. With ``compiled`` blocks, it measures
    whole blocks instead: hooks inside a block would break its graph, or not be part of it.

    The time does not include gathering weights: the engines' hooks run before these.
    """

    def __init__(self, network: nn.Module, device: torch.device, compiled: bool) -> None:
        super().__init__(device)
        blocks = [module for module in network.modules() if compiled and isinstance(module, Block)]
        inside = {module for block in blocks for module in block.modules()}
        layers = [module for module in network.modules() if isinstance(module, nn.Linear) and module not in inside]
        self.modules = [*blocks, *layers]
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for module in self.modules:
            self._hooks += [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()


class Stragglers:
    """Reports a rank once it is slow in several consecutive measurements, and only once per streak. ``hosts``: of all ranks."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self._slow = Counter[tuple[int, str]]()

    def compare(self, computed_s: Sequence[float], waited_s: Sequence[float], step_s: float) -> None:
        """Compare all ranks' seconds of computing, and of waiting for data per step. A step takes ``step_s``."""
        computing, waiting = statistics.median_low(computed_s), statistics.median_low(waited_s)
        for rank, (computed, waited) in enumerate(zip(computed_s, waited_s, strict=True)):
            slow = f"rank {rank} ({self.hosts[rank]}) is slow"
            if self._repeated(rank, "arithmetic", computed > SLOW * computing > 0):
                dist.say(f"{slow}: its layers take {computed / computing:.1f} times as long as the median rank's")
            if self._repeated(rank, "data", waited - waiting > (SLOW - 1) * step_s):
                dist.say(f"{slow}: it waits {waited:.2f} s per step for data, the median rank {waiting:.2f} s")

    def _repeated(self, rank: int, what: str, slow: bool) -> bool:
        self._slow[rank, what] = self._slow[rank, what] + 1 if slow else 0
        return self._slow[rank, what] == CONSECUTIVE
