"""One process, whole tensors, plain PyTorch: the engine that the others are held to."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.data.loader import Batch
from xar_scale.engines.base import Engine, Shard, adam_state, set_steps
from xar_scale.errors import ConfigError
from xar_scale.graphs import WARM_UP, Graphs, records
from xar_scale.model.apex import choose_library
from xar_scale.model.xar import XAR, Weight
from xar_scale.optim import create_adamw

FIRST, ADDED = "first", "added"  # passes of a step: what they do with gradients


class SingleEngine(Engine):
    def __init__(self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> None:
        """Raises ConfigError when there is more than one rank."""
        if dist.world() > 1:
            raise ConfigError(f"train.engine single is one process, not {dist.world()}; use train.engine=deepspeed")
        super().__init__(model, config, device)
        for weight in weights:
            weight.place(device)
        self.parameters = dict(model.named_parameters())
        library = choose_library(config.kernels.library, device)
        self.optimizer = create_adamw(self.parameters, self.shapes, config.optim, library)
        self._graphs: Graphs | None = None
        self._apply_precision()

    @property
    def plays_records(self) -> bool:
        return self.device.type == "cuda" and records(self.config, self.mode)

    def forward_backward(self, batch: Batch) -> Tensor:
        """Compiled passes are recorded on a GPU, but for those that hooks look into."""
        graphs = self._graphs
        if graphs is None:
            return super().forward_backward(batch)
        if any(module._forward_hooks for module in self.model.modules()):
            self._graphs = Graphs(self.device)  # whose memory such a pass needs
            return super().forward_backward(batch)
        parameters = [*self.parameters.values()]
        inputs = batch.latents, batch.labels, batch.t, batch.noise
        first = parameters[0].grad is None
        if not first and not graphs.knows(FIRST, *inputs):  # the gradients that it adds to are not yet where they will stay
            return super().forward_backward(batch)

        def work(latents: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Sequence[Tensor | None]:
            held = replace(batch, latents=latents, labels=labels, t=t, noise=noise)
            loss = super(SingleEngine, self).forward_backward(held)
            return [loss, *(parameter.grad for parameter in parameters)]

        # what is added is warm by then, and unrecorded would need its activations beside those of the records
        kind, warm_up = (FIRST, WARM_UP) if first else (ADDED, 0)
        loss, *gradients = graphs.play(kind, work, *inputs, warm_up=warm_up)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        assert loss is not None
        return loss.clone()

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def _apply_precision(self) -> None:
        """Autocast is all there is. What was recorded in another precision goes, and with it its memory."""
        self._graphs = Graphs(self.device) if self.plays_records else None

    def _optimizer_step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def shards(self) -> Iterator[Shard]:
        for name, parameter in self.parameters.items():
            state = adam_state(self.optimizer, parameter)
            views = (tensor.detach().view(-1) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]))
            yield Shard(name, parameter.shape, 0, parameter.numel(), *views)

    def shards_written(self, steps: int) -> None:
        for parameter in self.parameters.values():
            set_steps(self.optimizer, parameter, steps)
        self._apply_precision()  # whoever writes may draw next, and needs the records' memory
