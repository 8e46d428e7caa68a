"""Which ranks compute more slowly than others. A step is as long on all of them: what differs is the time that the arithmetic
itself takes, without what is waited for."""

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

SLOW = 1.3  # times the median rank's
OFTEN = 3  # measurements in a row, before it is said


class ForwardTime:
    """Seconds that the Linear layers of a network compute in the context, forwards; the device is not waited for.

    Their weights are there when it begins: engines gather them before, in hooks that come before these.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
        self.device = device
        self._begun: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer in self.layers:
            self._hooks += [layer.register_forward_pre_hook(self._begin), layer.register_forward_hook(self._end)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

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


class Stragglers:
    """Names ranks that are slow in several measurements one after another, once."""

    def __init__(self) -> None:
        self._slow = Counter[int]()

    def compare(self, seconds: float) -> list[float]:
        """This rank's time with all others'; every rank calls this. Returns everybody's."""
        found = dist.gather_objects((seconds, socket.gethostname()))
        median = statistics.median_low(value for value, _ in found)
        for rank, (value, host) in enumerate(found):
            self._slow[rank] = self._slow[rank] + 1 if value > SLOW * median else 0
            if self._slow[rank] == OFTEN:
                dist.say(
                    f"rank {rank} ({host}) is slow: its layers compute {value / median:.1f} times as long as the median rank's"
                )
        return [value for value, _ in found]
