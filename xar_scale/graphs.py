"""CUDA graphs: work on a GPU that is recorded once and played again, one launch of the host's in place of thousands."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xar_scale.config import Config
from xar_scale.precision import MODES

Work = Callable[..., Sequence[Tensor | None]]
WARM_UP = 2  # times that work is done as it is first: what is compiled, chosen or made once must not be recorded


def can_capture(config: Config, mode: str) -> bool:
    """Whether a GPU's passes in ``mode`` are recorded: a loss scale changes, and recomputation sets the generator back."""
    plain = config.kernels.compile and config.train.recompute == "none" and not MODES[mode].scaled
    return config.train.replicated and plain


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Sequence[Tensor | None]


class Graphs:
    """Records of one device, by kind of work.

    A network of many layers makes thousands of launches a pass; where the host makes them more slowly than the GPU works them
    off, that is what a pass takes. Work that is recorded reads and writes the same memory each time: it waits for nothing,
    takes no decision, and finds what it uses beside its inputs (weights, caches) where it was. Random numbers are the
    generator's, as ever.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream(device)
        self._pool: Any = None  # of all records: only one plays at a time
        self._done = Counter[Hashable]()
        self._captured: dict[Hashable, _Captured] = {}

    def run(self, kind: Hashable, work: Work, *inputs: Tensor, warm_up: float = WARM_UP) -> Sequence[Tensor | None]:
        """What ``work(*inputs)`` returns; after ``warm_up`` times, by kind and shapes, from a record. Then the outputs are in
        the record's memory, until it, or one that was made before it, is played again."""
        key = _key(kind, inputs)
        if self._done[key] < warm_up:
            self._done[key] += 1
            return self._warm_up(work, inputs)
        if key not in self._captured:
            self._captured[key] = self._capture(work, inputs)
        captured = self._captured[key]
        for held, given in zip(captured.inputs, inputs, strict=True):
            held.copy_(given)
        captured.graph.replay()
        return captured.outputs

    def has_captured(self, kind: Hashable, *inputs: Tensor) -> bool:
        """Whether there is a record of that kind, and of such inputs."""
        return _key(kind, inputs) in self._captured

    def _warm_up(self, work: Work, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """On the stream that is recorded: what is made once is made for it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = work(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, work: Work, inputs: Sequence[Tensor]) -> _Captured:
        held = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        # other threads (data, checkpoints, the watchdog) may use the device meanwhile
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = work(*held)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, held, outputs)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all records: cuBLAS keeps a workspace for each stream that it was ever used on."""
    return torch.cuda.Stream(device)


def _key(kind: Hashable, inputs: Sequence[Tensor]) -> Hashable:
    return kind, *((tensor.shape, tensor.dtype) for tensor in inputs)
