"""FSDP2: PyTorch's own sharding of parameters, gradients and Adam moments over the ranks, block by block."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
    """Float32 shards by rows. A block's parameters are gathered in the mode's dtype for its forward and its backward pass, and
    freed after each. Parameters outside the blocks are gathered in float32. Gradients are reduced in float32.
    """

    def __init__(self, model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> None:
        super().__init__(model, config, device)
        self.ranks = shard_ranks(config.train, dist.world())
        mesh = create_mesh(self.ranks, device)
        if self.replicas > 1:
            self.replica_group = mesh.get_group("copy")
        # plain tensors: the optimizer need not know about DTensor
        self.local = shard_model(model, mesh, self._policy(), device)
        for weight in weights:
            parameter = getattr(weight.module, weight.key)
            start, stop = owned_range(parameter.shape, self.ranks)
            _local(parameter).view(-1).copy_(weight.value.view(-1)[start:stop])
        self.parameters = dict(model.named_parameters())
        library = choose_library(config.kernels.library, device)
        self.optimizer = create_adamw(self.local, self.shapes, config.optim, device, library)

    def _policy(self) -> MixedPrecisionPolicy:
        # Inputs are not cast: times in 16 bits would fall into other time bins. Autocast chooses compute dtypes
        precision = self.precision
        return MixedPrecisionPolicy(precision.gather, precision.reduce, cast_forward_inputs=False)

    def _apply_precision(self) -> None:
        self.network.reshard()  # type: ignore[operator]
        for module, policy in _policies(self.model, self._policy()):
            # torch 2.15: a module's state casts inputs and outputs, and each parameter is cast by its own policy (up to 2.14 by
            # its group's). The buffers that parameters are gathered in are created once, by the first gather
            state = module._get_fsdp_state()  # type: ignore[operator]
            state._mp_policy = policy
            # in torch 2.11 a state has a single group
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

    def _optimizer_step(self) -> None:
        for name, parameter in self.parameters.items():
            self.local[name].grad = None if parameter.grad is None else _local(parameter.grad)
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
        self.network.reshard()  # type: ignore[operator]  # the next forward pass gathers again


def create_mesh(ranks: int, device: torch.device) -> DeviceMesh:
    """Return sharding groups of ``ranks`` neighbouring ranks. If there are several (HSDP), the mesh has a dimension "copy":
    weights are gathered within a group, gradients are reduced over all ranks."""
    copies = dist.world() // ranks
    shape, names = ((ranks,), ("shard",)) if copies == 1 else ((copies, ranks), ("copy", "shard"))
    return init_device_mesh(device.type, shape, mesh_dim_names=names)


def shard_model(model: XAR, mesh: DeviceMesh, policy: MixedPrecisionPolicy, device: torch.device) -> dict[str, Tensor]:
    """Shard the parameters by rows over the sharding groups of ``mesh``, each of which holds one replica. Values are left
    uninitialised. A block's parameters are gathered for its forward and its backward pass, and freed after each.

    Returns this rank's shards by name, as plain tensors that share the parameters' memory.
    """
    # blocks return views, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mark_weights_gathered(model)
    for module, its_policy in _policies(model, policy):
        fully_shard(module, mesh=mesh, mp_policy=its_policy)
    model.to_empty(device=device)  # allocates the shards only
    return {name: _local(parameter) for name, parameter in model.named_parameters()}


def _policies(model: XAR, policy: MixedPrecisionPolicy) -> Iterator[tuple[nn.Module, MixedPrecisionPolicy]]:
    """Yield each block with ``policy``, and the rest of the model with a policy that gathers in float32.

    The rest is small. With positions gathered in 16 bits, the residual stream would be 16-bit, and is float32 in other engines.
    """
    yield from ((block, policy) for block in model.blocks)
    yield model, replace(policy, param_dtype=FP32)


def owned_range(shape: torch.Size, ranks: int) -> tuple[int, int]:
    """Return the elements [start, stop) of a parameter that this rank owns, sharded over ``ranks`` ranks: whole rows, the same
    number on each rank but for the last ones."""
    rows, row = shape[0], math.prod(shape[1:])
    chunk = -(-rows // ranks)
    start = min(dist.rank() % ranks * chunk, rows)
    return start * row, min(start + chunk, rows) * row


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
