"""FSDP2: PyTorch's own sharding of parameters, gradients and moments over all ranks, a block at a time."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from xar_scale import dist
from xar_scale.config import Config, shard_ranks
from xar_scale.engines.base import Engine, Shard, adam_state, set_steps
from xar_scale.model.aligned import mark_weights_gathered
from xar_scale.model.apex import choose_library
from xar_scale.model.xar import XAR, Weight
from xar_scale.optim import create_adamw
from xar_scale.precision import FP32


class FSDP2Engine(Engine):
    """Float32 shards by rows. A block's parameters are gathered for its passes, in the mode's dtype, and let go of after each;
    those in no block in float32. Gradients are reduced in float32.
    """

    def __init__(self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        self.ranks = shard_ranks(config.train, dist.world())
        # an optimizer need not know what they are shards of
        self.local = shard_model(model, self.ranks, self._policy(), device)
        for weight in weights:
            parameter = getattr(weight.module, weight.key)
            start, stop = owned_range(parameter.shape, self.ranks)
            _local(parameter).view(-1).copy_(weight.value.view(-1)[start:stop])
        self.parameters = dict(model.named_parameters())
        library = choose_library(config.kernels.library, device)
        self.optimizer = create_adamw(self.local, self.shapes, config.optim, library)

    def _policy(self) -> MixedPrecisionPolicy:
        # Inputs stay as they are: times in 16 bits would fall into other bins. Autocast decides what is computed in what
        precision = self.precision
        return MixedPrecisionPolicy(precision.gather, precision.reduce, cast_forward_inputs=False)

    def _apply_precision(self) -> None:
        self.network.reshard()  # type: ignore[operator]
        for module, policy in _policies(self.model, self._policy()):
            # torch 2.15: a module's state casts inputs and outputs, its parameters are cast one by one, up to 2.14 by their
            # group's policy, and what they are gathered in is made once, by the first gather
            state = module._get_fsdp_state()  # type: ignore[operator]
            state._mp_policy = policy
            # in torch 2.11 a state has one group
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                group.mp_policy = policy
                for parameter in group.fsdp_params:
                    parameter.mp_policy = policy
                    parameter.all_gather_outputs = []
                    if hasattr(parameter, "_unsharded_param"):
                        del parameter._unsharded_param
                group._init_mp_dtypes()

    def gradients(self) -> list[Tensor]:
        return [_local(parameter.grad) for parameter in self.parameters.values() if parameter.grad is not None]

    def _optimizer_step(self, learning_rate: float) -> None:
        for name, parameter in self.parameters.items():
            self.local[name].grad = None if parameter.grad is None else _local(parameter.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.discard()

    def discard(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def shards(self) -> Iterator[Shard]:
        for name, weight in self.local.items():
            state = adam_state(self.optimizer, weight)
            start, stop = owned_range(self.shapes[name], self.ranks)
            views = (tensor.detach().view(-1) for tensor in (weight, state["exp_avg"], state["exp_avg_sq"]))
            yield Shard(name, self.shapes[name], start, stop, *views)

    def shards_written(self, steps: int) -> None:
        for weight in self.local.values():
            set_steps(self.optimizer, weight, steps)
        self.network.reshard()  # type: ignore[operator]  # the next pass gathers anew


def shard_model(model: XAR, ranks: int, policy: MixedPrecisionPolicy, device: torch.device) -> dict[str, Tensor]:
    """Spread the parameters by rows over groups of ``ranks`` neighbours, each of which shares a copy; their values are yet to
    come. A block's are gathered for its passes, and let go of after each.

    Returns this rank's shards by name, as plain tensors that share the parameters' memory.
    """
    # blocks put out views, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mark_weights_gathered(model)
    copies = dist.world() // ranks
    # of two dimensions where there are several copies: gathered among neighbours, gradients reduced over all
    shape, names = ((ranks,), ("shard",)) if copies == 1 else ((copies, ranks), ("copy", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for module, its_policy in _policies(model, policy):
        fully_shard(module, mesh=mesh, mp_policy=its_policy)
    model.to_empty(device=device)  # of the shards
    return {name: _local(parameter) for name, parameter in model.named_parameters()}


def _policies(model: XAR, policy: MixedPrecisionPolicy) -> Iterator[tuple[nn.Module, MixedPrecisionPolicy]]:
    """Blocks by ``policy``; what is in none is gathered in float32: it is little, and from positions in 16 bits on all that is
    added block by block would be of 16 bits, which under other engines is float32."""
    yield from ((block, policy) for block in model.blocks)
    yield model, replace(policy, param_dtype=FP32)


def owned_range(shape: torch.Size, ranks: int) -> tuple[int, int]:
    """The elements [start, stop) of a parameter that this rank owns of a copy that ``ranks`` neighbours share: whole rows, as
    many on each rank, but for the last ones."""
    rows, row = shape[0], math.prod(shape[1:])
    chunk = -(-rows // ranks)
    start = min(dist.rank() % ranks * chunk, rows)
    return start * row, min(start + chunk, rows) * row


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
