"""CUDA graphs: GPU work that is captured once and replayed, with one kernel launch in place of thousands."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xar_scale.config import Config
from xar_scale.precision import MODES

Work = Callable[..., Sequence[Tensor | None]]
WARM_UP = 2  # eager runs before capture: one-time work (compiling, choosing kernels, allocating) must not be captured


def can_capture(config: Config, mode: str) -> bool:
    """Return whether a GPU captures forward-backward passes in ``mode``.

    Not with a loss scale, which changes, nor with recomputation, which resets the generator.
    """
    plain = config.kernels.compile and config.train.recompute == "none" and not MODES[mode].scaled
    return config.train.replicated_weights and plain


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Sequence[Tensor | None]


class Graphs:
    """The captured graphs of one device, by kind of work and input shapes.

    A deep network makes thousands of kernel launches per forward-backward pass. Where the host launches more slowly than the
    GPU computes, launch overhead decides how long the pass takes. Captured work reads and writes the same memory at each
    replay: it must not wait for the device or branch on values, and whatever it uses besides its inputs (weights, caches) must
    stay in place. Random numbers come from the device's generator, as in eager runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _stream(device)
        self._pool: Any = None  # shared by all graphs: only one replays at a time
        self._done = Counter[Hashable]()
        self._captured: dict[Hashable, _Captured] = {}

    def run(self, kind: Hashable, work: Work, *inputs: Tensor, warm_up: float = WARM_UP) -> Sequence[Tensor | None]:
        """Return the outputs of ``work(*inputs)``, which is replayed after ``warm_up`` eager calls per kind and shapes.

        Replayed outputs are in the graph's memory. They are valid until this graph, or one captured before it, is replayed.
        """
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
        """Return whether there is a graph of this kind and of inputs with these shapes and dtypes."""
        return _key(kind, inputs) in self._captured

    def _warm_up(self, work: Work, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Run ``work`` eagerly on the capture stream: what is made once per stream is made there."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = work(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def _capture(self, work: Work, inputs: Sequence[Tensor]) -> _Captured:
        held = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (data, checkpoints, the watchdog) may use the device during the capture
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = work(*held)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, held, outputs)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one capture stream of a device: cuBLAS keeps a workspace for each stream that it was ever used on."""
    return torch.cuda.Stream(device)


def _key(kind: Hashable, inputs: Sequence[Tensor]) -> Hashable:
    return kind, *((tensor.shape, tensor.dtype) for tensor in inputs)
