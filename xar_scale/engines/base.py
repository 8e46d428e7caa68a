"""What every engine does: passes, one agreed verdict, a step or none, and its shard of weights and moments by name."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xar_scale import dist, rng
from xar_scale.config import Config, micro_batches
from xar_scale.data.loader import Batch
from xar_scale.flow import velocity_loss
from xar_scale.model.xar import XAR
from xar_scale.precision import MODES, apply_matmul_mode


class Shard(NamedTuple):
    """The flat range [start, stop) of one parameter that this rank owns; the tensors are float32 views of that length."""

    name: str
    shape: torch.Size  # of the whole parameter
    start: int
    stop: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class Verdict:
    """The step's mean loss, gradient norm and number of faults over all ranks: the same numbers everywhere."""

    loss: Tensor
    grad_norm: Tensor
    faults: Tensor

    def clean(self) -> bool:
        """True when nothing stands against the step: all is finite, and no rank has met a new fault. Waits for the device."""
        return bool(torch.isfinite(self.loss) & torch.isfinite(self.grad_norm) & (self.faults == 0))

    def finite(self) -> bool:
        """False when any rank's loss or gradient is NaN or infinite. Waits for the device."""
        return bool(torch.isfinite(self.loss) & torch.isfinite(self.grad_norm))


class Engine(ABC):
    """Trains a model whose float32 weights and moments are cut over the ranks, and shows them by name.

    A step is: ``seed_step``, one ``forward_backward`` a pass, ``agree``, then ``step`` or ``discard``.
    """

    def __init__(self, model: XAR, config: Config, device: torch.device) -> None:
        self.layout, self.config, self.device = model.layout, config, device
        self.passes = micro_batches(config.train, dist.world())[1]
        self.compute = MODES[config.train.precision].compute
        self.network: nn.Module = model
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        apply_matmul_mode(config.train.precision)

    def seed_step(self, step: int) -> None:
        """Seed whatever draws on the device (dropout) from (seed, step, rank)."""
        torch.manual_seed(rng.torch_seed(self.config.train.seed, f"device/{dist.rank()}", step))

    def _loss(self, batch: Batch) -> Tensor:
        return velocity_loss(self.network, self.layout, batch.latents, batch.noise, batch.t, batch.labels)

    def forward_backward(self, batch: Batch) -> Tensor:
        """One pass: adds its part of the step's mean gradient. Returns this rank's loss of the pass, detached."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute is torch.bfloat16):
            loss = self._loss(batch)
        (loss / self.passes).backward()
        return loss.detach()

    def agree(self, loss: Tensor, faults: int = 0) -> Verdict:
        """After the last pass, with this rank's mean loss over passes and number of new faults of its data: what all ranks know
        of the step. One reduction."""
        squares = [gradient.float().square().sum() for gradient in self.gradients()]
        of_rank = [loss.float() / dist.world(), torch.stack(squares).sum(), torch.full_like(loss, faults, dtype=torch.float32)]
        sums = dist.all_reduce_sum(torch.stack(of_rank))
        return Verdict(loss=sums[0], grad_norm=sums[1].sqrt(), faults=sums[2])

    def step(self, learning_rate: float, verdict: Verdict) -> None:
        """Clip the agreed gradient norm to ``optim.clip`` and update the weights."""
        scale = (self.config.optim.clip / (verdict.grad_norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(self.gradients(), scale)
        self._optimizer_step(learning_rate)

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """This rank's shards of the reduced gradient, each element on one rank only (padding is zero)."""

    @abstractmethod
    def _optimizer_step(self, learning_rate: float) -> None: ...

    @abstractmethod
    def discard(self) -> None:
        """Drop the step's gradients; weights and moments stay."""

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """This rank's part of every parameter, in the model's order."""

    @abstractmethod
    def shards_written(self, steps: int) -> None:
        """Tell the engine that ``shards()`` were written to: weights used by the next pass, and ``steps`` taken, follow."""


def adam_state(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The moments of one tensor, made as zeros where no step has been taken yet."""
    state: dict[str, Tensor] = optimizer.state[weight]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(weight, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(weight, requires_grad=False)
    return state


def set_steps(optimizer: torch.optim.Optimizer, weight: Tensor, steps: int) -> None:
    """Tell the optimizer how many steps its moments of ``weight`` have seen; where it counts a group, the whole group."""
    adam_state(optimizer, weight)["step"].fill_(steps)
    for group in optimizer.param_groups:
        group["step"] = steps
