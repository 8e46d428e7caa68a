"""Which ranks are slower than others. A step is as long on all of them: what differs is the time that the arithmetic itself
takes, without what is waited for, and the time that data are waited for."""

import socket
import statistics
import time
from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from xar_scale import dist
from xar_scale.model.layers import Block

SLOW = 1.3  # times the median rank's arithmetic; so much longer, for its data, would a step be
CONSECUTIVE = 3  # measurements in a row, before it is said


class SpanTimer:
    """Seconds of what is begun and ended; the device is not waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._begun: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []

    def _begin(self, *_: Any) -> None:
        self._begun.append(self._now())

    def _end(self, *_: Any) -> None:
        self._spans.append((self._begun[-1], self._now()))  # one that recomputation cuts short has no end

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def seconds(self) -> float:
        """After the device has come to all of it."""
        if self.device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in self._spans) / 1000
        return sum(end - begin for begin, end in self._spans)


class PassTime(SpanTimer):
    """Seconds in the context, as often as it is entered: of passes in which nothing is sent."""

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


class ForwardTime(SpanTimer):
    """Seconds that the Linear layers of a network compute in the context, forwards. With ``compiled`` blocks, whose
    graphs hooks inside would cut, or not be in, blocks as a whole in place of their layers.

    Weights are there when it begins: engines gather them before, in hooks that come before these.
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
    """Names ranks that are slow in several measurements one after another, once."""

    def __init__(self) -> None:
        self._slow = Counter[tuple[int, str]]()

    def compare(self, computed: float, waited: float, step: float) -> list[float]:
        """This rank's seconds of arithmetic, and of waiting for the data of a step, which takes ``step``, with all others'.
        Returns everybody's of arithmetic. Every rank calls this."""
        found = dist.gather_objects((computed, waited, socket.gethostname()))
        computing, waiting = (statistics.median_low(values) for values in ([of[0] for of in found], [of[1] for of in found]))
        for rank, (computed, waited, host) in enumerate(found):
            slow = f"rank {rank} ({host}) is slow"
            if self._repeated(rank, "arithmetic", computed > SLOW * computing):
                dist.say(f"{slow}: its layers compute {computed / computing:.1f} times as long as the median rank's")
            if self._repeated(rank, "data", waited - waiting > (SLOW - 1) * step):
                dist.say(f"{slow}: it waits {waited:.2f} s a step for data, the median rank {waiting:.2f} s")
        return [of[0] for of in found]

    def _repeated(self, rank: int, what: str, slow: bool) -> bool:
        self._slow[rank, what] = self._slow[rank, what] + 1 if slow else 0
        return self._slow[rank, what] == CONSECUTIVE
