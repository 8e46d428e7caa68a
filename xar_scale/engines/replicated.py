"""Engines with replicated (unsharded) weights: on a GPU their compiled micro-batches are replayed from CUDA graphs."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xar_scale.config import Config
from xar_scale.data.loader import Batch
from xar_scale.engines.base import Engine
from xar_scale.graphs import WARM_UP, Graphs, can_capture
from xar_scale.model.xar import XAR

FIRST, ADDED = "first", "added"  # micro-batches of a step: the first writes gradients, later ones add to them


class ReplicatedEngine(Engine):
    def __init__(self, model: XAR, config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        self._graphs: Graphs | None = None
        self._apply_precision()

    @property
    def replays_graphs(self) -> bool:
        return self.device.type == "cuda" and can_capture(self.config, self.mode)

    def forward_backward(self, batch: Batch) -> Tensor:
        """As the base class. On a GPU compiled micro-batches are replayed from CUDA graphs, unless hooks observe modules."""
        graphs = self._graphs
        if graphs is None:
            return super().forward_backward(batch)
        if any(module._forward_hooks for module in self.model.modules()):
            self._graphs = Graphs(self.device)  # drop the graphs: the observed pass needs their memory
            return super().forward_backward(batch)
        inputs = batch.latents, batch.labels, batch.t, batch.noise

        def work(latents: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Sequence[Tensor | None]:
            held = replace(batch, latents=latents, labels=labels, t=t, noise=noise)
            loss = super(ReplicatedEngine, self).forward_backward(held)
            return [loss, *self._gradients_made()]

        # ADDED adds to the gradients of FIRST, so it is captured only once FIRST is: from then on they stay in place. It is
        # then captured at once, without warm-up: an eager micro-batch would need its activations on top of the graphs' memory
        if self._has_gradients:
            kind, warm_up = ADDED, 0 if graphs.has_captured(FIRST, *inputs) else math.inf
        else:
            kind, warm_up = FIRST, WARM_UP
        loss, *gradients = graphs.run(kind, work, *inputs, warm_up=warm_up)
        self._take_gradients(gradients)
        assert loss is not None
        return loss.clone()

    def _optimizer_step(self) -> None:
        self.optimizer.step()
        self.discard()

    def _apply_precision(self) -> None:
        """Drop the graphs captured in another precision, and their memory. Autocast does the rest."""
        self._graphs = Graphs(self.device) if self.replays_graphs else None

    @property
    @abstractmethod
    def _has_gradients(self) -> bool:
        """Whether this step already has gradients of a micro-batch."""

    @abstractmethod
    def _gradients_made(self) -> Sequence[Tensor | None]:
        """Return the gradients that a micro-batch leaves in memory of its own: a graph's memory where it is captured."""

    @abstractmethod
    def _take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Account for a micro-batch that was run or replayed, and take its ``_gradients_made``."""
