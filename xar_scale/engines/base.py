"""The engine base class: micro-batches, one verdict agreed by all ranks, a step or none, and shards of the state by name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from xar_scale import dist, rng
from xar_scale.config import Config, micro_batches, shard_ranks
from xar_scale.data.loader import Batch
from xar_scale.flow import velocity_loss
from xar_scale.guard import Bad
from xar_scale.model.xar import XAR
from xar_scale.precision import MODES, Precision, apply_matmul_mode, autocast

NORM_ROW = 4096


class Shard(NamedTuple):
    """This rank's flat range [start, stop) of one parameter; the tensors are float32 views of that length."""

    name: str
    shape: torch.Size  # of the unsharded parameter
    start: int
    stop: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class Verdict:
    """What all ranks know about a step before it is taken; the same numbers on every rank."""

    loss: float  # mean over the global batch
    grad_norm: float
    bad: Bad  # what is not finite
    faults: int  # newly unreadable samples, summed over the ranks
    stop: bool  # whether some rank was asked to stop


class Engine(ABC):
    """Trains a model, and exposes this rank's shards of its float32 weights and Adam moments by name.

    A step is ``attempt`` and then ``step`` or ``discard``. After ``discard`` it can be attempted again.
    """

    optimizer: Any  # torch's AdamW, or ZeRO's optimizer around it

    def __init__(self, model: XAR, config: Config, device: torch.device) -> None:
        self.model, self.layout, self.config, self.device = model, model.layout, config, device
        self.accumulation_steps = micro_batches(config.train, dist.world())[1]
        self.replicas = dist.world() // shard_ranks(config.train, dist.world())
        self.replica_group: torch_dist.ProcessGroup | None = None  # the ranks that own what this rank owns; None: only this one
        self.network: nn.Module = model
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.rank = dist.rank()  # seeds dropout
        self.loss_scale = 1.0  # multiplies the loss, and so the gradients, where fp16 would underflow
        self.mode: str = config.train.precision
        self.splits = 1
        self.micro_batch_context: AbstractContextManager[object] = nullcontext()  # entered once per micro-batch
        apply_matmul_mode(self.mode)

    @property
    def precision(self) -> Precision:
        return MODES[self.mode]

    @property
    def replays_graphs(self) -> bool:
        """Whether micro-batches are replayed from CUDA graphs, which hooks cannot observe."""
        return False

    def set_precision(self, mode: str, splits: int = 1) -> None:
        """Between steps: compute in ``mode`` from here on, and split each micro-batch into ``splits`` parts, run in turn."""
        self.mode, self.splits = mode, splits
        apply_matmul_mode(mode)
        self.model.use_kernels(self.config.kernels, self.device, self.precision.compute, training=True)
        self._apply_precision()

    def attempt(self, step: int, batches: Sequence[Batch], faults: int = 0, stop: bool = False) -> Verdict:
        """Run all micro-batches of a step and return the ranks' verdict. ``faults``: the samples that this rank could not read.
        ``stop``: whether this rank was asked to stop.

        This is the only point of a step where the host waits for the device.
        """
        self._seed(step)
        loss, inputs = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for batch in batches:
            with self.micro_batch_context:
                loss += self.forward_backward(batch) / self.accumulation_steps
            inputs += batch.inputs_sum()
        return self.agree(loss, inputs, faults, stop)

    def _seed(self, step: int) -> None:
        """Seed the device generator (dropout) from (seed, step, rank)."""
        torch.manual_seed(rng.torch_seed(self.config.train.seed, f"device/{self.rank}", step))

    def _loss(self, batch: Batch) -> Tensor:
        return velocity_loss(self.network, self.layout, batch.latents, batch.noise, batch.t, batch.labels)

    def forward_backward(self, batch: Batch) -> Tensor:
        """Run one micro-batch and accumulate its share of the step's mean gradient. Returns its loss on this rank, detached."""
        total = torch.zeros((), device=self.device)
        for part in batch.split(self.splits):
            with autocast(self.device, self.precision.compute):
                loss = self._loss(part) / self.splits
            (loss * (self.loss_scale / self.accumulation_steps)).backward()
            total += loss.detach()
        return total

    def agree(self, loss: Tensor, inputs: Tensor, faults: int = 0, stop: bool = False) -> Verdict:
        """Reduce a step's results over all ranks into one verdict: one all-reduce, and one wait for the device.

        Called after the last micro-batch with this rank's values: ``loss``, the mean over micro-batches; ``inputs``, a number
        that is finite if all inputs are; ``faults``; and ``stop``, whether it was asked to stop.
        """
        # offloaded shards are summed where they are
        squares = sum_of_squares(self.gradients()).to(self.device)
        weights = finite_if_all_are(self._master_weights).to(self.device)
        self._bad = ~torch.isfinite(torch.stack([loss, squares, weights, inputs]))
        counts = torch.tensor([faults, stop], dtype=loss.dtype).to(self.device, non_blocking=True)
        parts = torch.cat([torch.stack([loss / dist.world(), squares / self.replicas]), counts])
        sums = dist.all_reduce_sum(torch.cat([parts, self._bad.float()])).tolist()
        found = _flags(sums[4:])
        if not math.isfinite(sums[1]):
            found |= Bad.GRADIENT  # the sum over ranks may overflow where no rank's own does
        return Verdict(sums[0], math.sqrt(max(sums[1], 0.0)) / self.loss_scale, found, round(sums[2]), sums[3] > 0)

    @property
    def local_bad(self) -> Bad:
        """What was not finite on this rank in the last attempt; the gradient is the reduced one. Waits for the device."""
        return _flags(self._bad.tolist())

    @contextmanager
    def ema_weights(self, averages: Sequence[Tensor], steps: int) -> Iterator[XAR]:
        """Between steps: a context in which the network has the EMA weights ``averages`` (flat, one per shard).

        All ranks must call the network alike. The trained weights are kept in the memory of ``averages`` meanwhile; both are
        restored afterwards, bitwise. ``steps``: the number of steps taken so far.
        """

        def exchange() -> None:
            for shard, average in zip(self.shards(), averages, strict=True):
                kept = shard.master.clone()
                shard.master.copy_(average)
                average.copy_(kept)
            self.shards_written(steps)

        def use_kernels(*, training: bool) -> None:
            self.model.use_kernels(self.config.kernels, self.device, self.precision.compute, training=training)

        with torch.no_grad():
            exchange()
        use_kernels(training=False)
        yield self.model  # no finally: an error ends the run, and restoring takes collectives, in which a rank would wait alone
        use_kernels(training=True)
        with torch.no_grad():
            exchange()

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        """Return the loss of each sample (B,). Collective: every rank calls this with the same number of samples."""
        with autocast(self.device, self.precision.compute):
            return torch.stack([self._loss(part) for part in batch.split(len(batch.labels))])

    @cached_property
    def _master_weights(self) -> list[Tensor]:
        return [shard.master for shard in self.shards() if shard.stop > shard.start]

    def ranks_with_bad_state(self, averages: Sequence[Tensor] = ()) -> list[int]:
        """Return the ranks on which weights, moments or the EMA weights ``averages`` are not finite. Reads the whole state."""
        tensors = [tensor for shard in self.shards() for tensor in shard[4:]]
        tensors = [tensor for tensor in (*tensors, *averages) if tensor.numel()]
        seen = dist.gather_floats(finite_if_all_are(tensors).item())
        return [rank for rank, (value,) in enumerate(seen) if not math.isfinite(value)]

    def step(self, learning_rate: float, verdict: Verdict) -> None:
        """Clip the agreed gradient norm to ``optim.clip`` and update the weights."""
        scale = min(self.config.optim.clip / (verdict.grad_norm + 1e-6), 1.0) / self.loss_scale
        if scale != 1.0:  # it reads and writes all gradients, and most steps of a run are below the clip norm
            torch._foreach_mul_(self.gradients(), scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer_step()

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Fill ``tensors``, which this rank owns together with other replicas, with the part that each replica has of them
        (``own_part``). Every rank calls this."""
        if self.replica_group is None:
            return
        for tensor in tensors:
            part, length = self.own_part(tensor.numel()), -(-tensor.numel() // self.replicas)
            padded, gathered = tensor.new_zeros(length), tensor.new_empty(length * self.replicas)
            padded[: part.stop - part.start] = tensor[part]
            dist.all_gather(gathered, padded, group=self.replica_group)
            tensor.copy_(gathered[: tensor.numel()])

    def own_part(self, elements: int) -> slice:
        """Return this rank's part of ``elements`` that several replicas own: each has an equal one, but for the last ones."""
        length, replica = -(-elements // self.replicas), dist.rank() // (dist.world() // self.replicas)
        return slice(min(replica * length, elements), min((replica + 1) * length, elements))

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return this rank's shards of the reduced gradient, each element on one rank of a replica (padding is zero)."""

    @abstractmethod
    def _apply_precision(self) -> None:
        """Make the engine's own state follow ``precision`` and ``splits``."""

    @abstractmethod
    def _optimizer_step(self) -> None: ...

    @abstractmethod
    def discard(self) -> None:
        """Drop the step's gradients; weights and moments stay."""

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """Yield this rank's part of every parameter, in the model's order."""

    @abstractmethod
    def shards_written(self, steps: int) -> None:
        """Tell the engine that ``shards()`` were written to: it updates the weights that it computes with, and sets the
        optimizer's step count to ``steps``."""


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares in float32, of tensors on one device."""
    if tensors[0].device.type == "cpu":  # a CPU norm sums sequentially, which loses digits: take norms of rows first
        rows = [tensor.flatten() for tensor in tensors]
        cuts = [row.numel() // NORM_ROW * NORM_ROW for row in rows]
        whole = [torch.linalg.vector_norm(row[:cut].view(-1, NORM_ROW), dim=1) for row, cut in zip(rows, cuts, strict=True)]
        tensors = [*whole, *(row[cut:] for row, cut in zip(rows, cuts, strict=True))]
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).square().sum()


def finite_if_all_are(tensors: list[Tensor]) -> Tensor:
    """Return a number that is finite if all ``tensors`` are; its value is inexact (a CPU's fast norms of large tensors are)."""
    if not tensors:  # on a rank that owns nothing
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(tensors)).sum()


def _flags(ranks: Sequence[float]) -> Bad:
    """Return the flags that at least one rank has set, from the counts of ranks."""
    flags = (Bad.LOSS, Bad.GRADIENT, Bad.WEIGHTS, Bad.INPUT)
    return reduce(or_, (flag for flag, number in zip(flags, ranks, strict=True) if number), Bad.NOTHING)


def adam_state(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """Return the Adam state of one tensor, created as zeros where no step has been taken yet."""
    state: dict[str, Tensor] = optimizer.state[weight]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)  # fused kernels read it on the device
        state["exp_avg"] = torch.zeros_like(weight, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(weight, requires_grad=False)
    return state


def set_steps(optimizer: torch.optim.Optimizer, weight: Tensor, steps: int) -> None:
    """Set how many steps the optimizer's moments of ``weight`` have seen; where it counts per group, for the whole group."""
    adam_state(optimizer, weight)["step"].fill_(steps)
    for group in optimizer.param_groups:
        group["step"] = steps
