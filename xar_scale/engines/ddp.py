"""Replicated weights and gradients, sharded moments and EMA weights: two collectives per step, none in a micro-batch."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.engines.base import Shard, Verdict, adam_state, set_steps
from xar_scale.engines.replicated import ReplicatedEngine
from xar_scale.model.apex import choose_library
from xar_scale.model.xar import XAR, Weight
from xar_scale.optim import create_adamw

ALIGNED = 64  # tensors start at multiples of 64 elements (256 bytes, as from the allocator): kernels read rows of 16 bytes


class DDPEngine(ReplicatedEngine):
    """Data parallelism with sharded optimizer state (ZeRO-1: Rajbhandari et al. 2020, section 5.1).

    All weights are views of one flat vector and all gradients of another, to which micro-batches add. Each rank owns the same
    equal range of both. After a step's last micro-batch one reduce-scatter sends gradients to their owners, and after the
    update one all-gather collects the weights, each over the whole vector, in float32. A micro-batch sends nothing: it runs as
    in one process.
    """

    def __init__(self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        self.starts, length = _placed(self.shapes, dist.world())
        self.owned = slice(length // dist.world() * self.rank, length // dist.world() * (self.rank + 1))
        self._weights, self._gradients = torch.zeros(length, device=device), torch.zeros(length, device=device)
        self._added: set[str] = set()  # parameters that already have gradients of this step
        names = {parameter: name for name, parameter in model.named_parameters()}
        for weight in weights:
            name = names[getattr(weight.module, weight.key)]
            value = self._full(self._weights, name)
            value.copy_(weight.value)
            parameter = weight._replace(value=value).place(device)
            # a function, not a method of this engine: a method would keep the engine and its parameters alive in a cycle
            parameter.register_post_accumulate_grad_hook(partial(_add, self._added, name, self._full(self._gradients, name)))
        self.parameters = dict(model.named_parameters())
        self.local = {name: self._part(self._weights, name) for name in self.shapes}
        here = {name: part for name, part in self.local.items() if part.numel()}
        for name, part in here.items():
            part.grad = self._part(self._gradients, name)
        self.optimizer = create_adamw(here, self.shapes, config.optim, device, choose_library(config.kernels.library, device))
        # NCCL allocates its buffers for these now, not when a micro-batch has left no memory. And from here on weights are
        # equal on all ranks, even where hosts initialised them with different last bits
        self._reduce()
        self._gather()

    def _full(self, vector: Tensor, name: str) -> Tensor:
        shape = self.shapes[name]
        return vector[self.starts[name] :][: shape.numel()].view(shape)

    def _range(self, name: str) -> tuple[int, int]:
        """Return the elements [start, stop) of a parameter that this rank owns."""
        start, elements = self.starts[name], self.shapes[name].numel()
        begin, end = (min(max(at - start, 0), elements) for at in (self.owned.start, self.owned.stop))
        return begin, end

    def _part(self, vector: Tensor, name: str) -> Tensor:
        return self._full(vector, name).view(-1)[slice(*self._range(name))]

    @property
    def _has_gradients(self) -> bool:
        return bool(self._added)

    def _gradients_made(self) -> Sequence[Tensor | None]:
        return []

    def _take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        self._added.update(self.parameters)

    def agree(self, loss: Tensor, inputs: Tensor, faults: int = 0, stop: bool = False) -> Verdict:
        self._reduce()
        return super().agree(loss, inputs, faults, stop)

    def _reduce(self) -> None:
        if dist.world() > 1:
            dist.reduce_scatter(self._gradients[self.owned], self._gradients)
            self._gradients[self.owned].div_(dist.world())

    def gradients(self) -> list[Tensor]:
        assert len(self._added) in (0, len(self.parameters))  # a missing one would still hold an earlier step's gradient
        return [self._gradients[self.owned]] if self._added else []

    def _optimizer_step(self) -> None:
        super()._optimizer_step()
        self._gather()

    def _gather(self) -> None:
        if dist.world() > 1:
            dist.all_gather(self._weights, self._weights[self.owned])

    def discard(self) -> None:
        self._added.clear()  # the next micro-batch overwrites them

    def shards(self) -> Iterator[Shard]:
        for name, weight in self.local.items():
            state = adam_state(self.optimizer, weight)
            yield Shard(name, self.shapes[name], *self._range(name), weight, state["exp_avg"], state["exp_avg_sq"])

    def shards_written(self, steps: int) -> None:
        for weight in self.local.values():
            set_steps(self.optimizer, weight, steps)
        self._gather()
        self._apply_precision()  # drops the graphs: the caller may sample next, and needs their memory


def _add(added: set[str], name: str, total: Tensor, parameter: nn.Parameter) -> None:
    """Add a gradient to the vector as soon as it is computed, and free the tensor that it was computed in."""
    assert parameter.grad is not None
    total.add_(parameter.grad) if name in added else total.copy_(parameter.grad)
    added.add(name)
    parameter.grad = None


def _placed(shapes: dict[str, torch.Size], ranks: int) -> tuple[dict[str, int], int]:
    """Return each parameter's start in the flat vector, and the vector's length, which ``ranks`` divides evenly."""
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-shape.numel() // ALIGNED) * ALIGNED
    unit = ALIGNED * ranks
    return starts, -(-end // unit) * unit
