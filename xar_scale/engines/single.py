"""One process, unsharded tensors, plain PyTorch: the reference that the other engines are tested against."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from xar_scale.config import Config
from xar_scale.engines.base import Shard, adam_state, set_steps
from xar_scale.engines.replicated import ReplicatedEngine
from xar_scale.model.apex import choose_library
from xar_scale.model.xar import XAR, Weight
from xar_scale.optim import create_adamw


class SingleEngine(ReplicatedEngine):
    def __init__(self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        for weight in weights:
            weight.place(device)
        self.parameters = dict(model.named_parameters())
        library = choose_library(config.kernels.library, device)
        self.optimizer = create_adamw(self.parameters, self.shapes, config.optim, device, library)

    @property
    def _has_gradients(self) -> bool:
        return next(iter(self.parameters.values())).grad is not None

    def _gradients_made(self) -> Sequence[Tensor | None]:
        return [parameter.grad for parameter in self.parameters.values()]

    def _take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

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
        self._apply_precision()  # drops the graphs: the caller may sample next, and needs their memory
