"""Whole weights and gradients on each rank, of moments and averages a part: two collectives a step, and none in a pass."""

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

ALIGNED = 64  # elements that a tensor begins at a multiple of: kernels read rows of 16 bytes, and the allocator gives 256


class DDPEngine(ReplicatedEngine):
    """Data parallelism with the optimizer's state cut over the ranks (ZeRO-1: Rajbhandari et al. 2020, section 5.1).

    All weights are views of one vector and all gradients of another, which passes add to; a rank owns the same equal run of
    both. After a step's last pass gradients are reduced to their owners, and after the update weights are gathered from theirs,
    each in one collective of the whole vector, in float32. A pass is as one process has it: nothing is sent in it.
    """

    def __init__(self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        self.starts, length = _placed(self.shapes, dist.world())
        self.owned = slice(length // dist.world() * self.rank, length // dist.world() * (self.rank + 1))
        self._weights, self._gradients = torch.zeros(length, device=device), torch.zeros(length, device=device)
        self._added: set[str] = set()  # parameters whose gradients are of this step
        names = {parameter: name for name, parameter in model.named_parameters()}
        for weight in weights:
            name = names[getattr(weight.module, weight.key)]
            value = self._whole(self._weights, name)
            value.copy_(weight.value)
            parameter = weight._replace(value=value).place(device)
            # no method of this engine, which would then live as long as its parameters, and they as long as it
            parameter.register_post_accumulate_grad_hook(partial(_add, self._added, name, self._whole(self._gradients, name)))
        self.parameters = dict(model.named_parameters())
        self.local = {name: self._part(self._weights, name) for name in self.shapes}
        here = {name: part for name, part in self.local.items() if part.numel()}
        for name, part in here.items():
            part.grad = self._part(self._gradients, name)
        self.optimizer = create_adamw(here, self.shapes, config.optim, choose_library(config.kernels.library, device))
        # what NCCL needs for these it takes now, and not when a pass has left no room. Weights are the same from here on, also
        # where hosts have drawn them with other last bits
        self._reduce()
        self._gather()

    def _whole(self, vector: Tensor, name: str) -> Tensor:
        shape = self.shapes[name]
        return vector[self.starts[name] :][: shape.numel()].view(shape)

    def _range(self, name: str) -> tuple[int, int]:
        """The elements [start, stop) of a parameter that this rank owns."""
        start, elements = self.starts[name], self.shapes[name].numel()
        begin, end = (min(max(at - start, 0), elements) for at in (self.owned.start, self.owned.stop))
        return begin, end

    def _part(self, vector: Tensor, name: str) -> Tensor:
        return self._whole(vector, name).view(-1)[slice(*self._range(name))]

    @property
    def _has_gradients(self) -> bool:
        return bool(self._added)

    def _gradients_made(self) -> Sequence[Tensor | None]:
        return []

    def _take_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        self._added.update(self.parameters)

    def agree(self, loss: Tensor, inputs: Tensor | None = None, faults: int = 0, stop: bool = False) -> Verdict:
        self._reduce()
        return super().agree(loss, inputs, faults, stop)

    def _reduce(self) -> None:
        if dist.world() > 1:
            dist.reduce_scatter(self._gradients[self.owned], self._gradients)
            self._gradients[self.owned].div_(dist.world())

    def gradients(self) -> list[Tensor]:
        assert len(self._added) in (0, len(self.parameters))  # one without would have an earlier step's
        return [self._gradients[self.owned]] if self._added else []

    def _optimizer_step(self, learning_rate: float) -> None:
        super()._optimizer_step(learning_rate)
        self._gather()

    def _gather(self) -> None:
        if dist.world() > 1:
            dist.all_gather(self._weights, self._weights[self.owned])

    def discard(self) -> None:
        self._added.clear()  # the next pass writes over them

    def shards(self) -> Iterator[Shard]:
        for name, weight in self.local.items():
            state = adam_state(self.optimizer, weight)
            yield Shard(name, self.shapes[name], *self._range(name), weight, state["exp_avg"], state["exp_avg_sq"])

    def shards_written(self, steps: int) -> None:
        for weight in self.local.values():
            set_steps(self.optimizer, weight, steps)
        self._gather()
        self._apply_precision()  # whoever writes may draw next, and needs the records' memory


def _add(added: set[str], name: str, whole: Tensor, parameter: nn.Parameter) -> None:
    """A gradient to those before it, as soon as a pass has made it, and let go of what it was made in."""
    assert parameter.grad is not None
    whole.add_(parameter.grad) if name in added else whole.copy_(parameter.grad)
    added.add(name)
    parameter.grad = None


def _placed(shapes: dict[str, torch.Size], ranks: int) -> tuple[dict[str, int], int]:
    """Where each parameter begins in a vector of all, and its length, of which ``ranks`` have equal parts."""
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-shape.numel() // ALIGNED) * ALIGNED
    unit = ALIGNED * ranks
    return starts, -(-end // unit) * unit
