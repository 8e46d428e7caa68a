"""Memory of a rank, reckoned before it is taken: in how many parts a pass fits after the guard's fall back to TF32."""

import os
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xar_scale import dist
from xar_scale.config import Config, micro_batches, shard_ranks
from xar_scale.ema import WIDTHS
from xar_scale.flow import velocity_loss
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import blank_weights, meta_model
from xar_scale.precision import FP32, MODES

STATE = 5 * 4  # bytes a weight: master, gradient, two moments and the average, in float32
ZERO3_STATE = STATE + 4  # ZeRO-3 gathers from a copy of the master
ZERO3_LIVE = 10**9  # weights that it keeps gathered: its default stage3_max_live_parameters and stage3_max_reuse_distance
MARGIN = 1.1  # CUDA's context, NCCL's buffers, what the allocator cannot use


class PassMemory(NamedTuple):
    """Bytes on the device, beside weights and their gradients: what the forward pass leaves for the backward pass, and the most
    at any moment of the two."""

    saved: int
    peak: int


class _Living(TorchDispatchMode):
    """Follows the storages that operations make on ``device``: ``bytes`` of those alive, the ``peak`` of that."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.bytes, self.peak = device, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device == self.device:
                self._meet(tensor.untyped_storage())
        return made

    def ignore(self, *tensors: Tensor) -> None:
        self.known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._lose, key, size)

    def _lose(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def pass_memory(config: Config, mode: str, samples: int, device: torch.device) -> PassMemory:
    """Of one pass of ``samples`` in precision ``mode``: the network's own, forward and backward, on tensors without memory.

    Gradients of weights are let go of as they come. Copies of weights that autocast makes and keeps count, except with engines
    that gather weights in 16 bits already. FlexAttention and apex, which take no such tensors, are stood for by what keeps as
    much: attention by entities, and PyTorch's norm.
    """
    precision = MODES[mode]
    model = meta_model(config.model)
    layout = model.layout
    layout.on(device)  # real, and made here: their making reads values
    attention = "prefix" if config.kernels.attention == "flex" else config.kernels.attention
    kernels = replace(config.kernels, attention=attention, library="torch")
    model.use_kernels(kernels, device, precision.compute, training=True)
    apply_recompute(model.blocks, config.train.recompute)
    gathered = FP32 if config.train.engine == "single" else precision.gather
    living = _Living(device)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for weight in blank_weights(model):
            cast = weight.value.to(gathered) if isinstance(weight.module, nn.Linear) else weight.value
            weight._replace(value=cast).place(device).register_post_accumulate_grad_hook(_let_go)
        latents = torch.zeros(samples, config.model.channels, *layout.grid, device=device)
        noise = torch.zeros(samples, layout.tokens, config.model.channels, device=device)
        t = torch.zeros(samples, layout.entities, device=device)
        labels = torch.zeros(samples, dtype=torch.int64, device=device)
        living.ignore(*model.parameters(), latents, noise, t, labels)
        stack.enter_context(living)
        with torch.autocast(device.type, dtype=precision.compute, enabled=precision.compute is not FP32):
            loss = velocity_loss(model, layout, latents, noise, t, labels)
        saved = living.bytes
        loss.backward()
    return PassMemory(saved, living.peak)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def rank_memory(config: Config, mode: str, samples: int, world: int, device: torch.device) -> float:
    """Bytes that a rank of ``world`` needs for passes of ``samples`` in ``mode``.

    Its share of the state, the pass, and with engines that cut weights what is gathered at once and gradients before they are
    reduced: of two blocks and of what is in no block under FSDP2, the more by its own bounds under ZeRO-3; and a tenth more.
    """
    model, train, precision = meta_model(config.model), config.train, MODES[mode]
    whole = sum(parameter.numel() for parameter in model.parameters())
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    at_once = whole - sum(blocks) + 2 * max(blocks)
    live = {"single": 0, "fsdp2": at_once, "deepspeed": max(at_once, min(whole, ZERO3_LIVE))}[train.engine]
    unreduced = 0 if train.engine == "single" else at_once
    each = ZERO3_STATE if train.engine == "deepspeed" else STATE
    each += 4 * len(WIDTHS) if config.optim.ema_snapshots_every else 0
    state = each * whole / shard_ranks(train, world)
    gathered = live * precision.gather.itemsize + unreduced * precision.reduce.itemsize
    return MARGIN * (state + gathered + pass_memory(config, mode, samples, device).peak)


def plan_fallback(config: Config, world: int, device: torch.device, room: float) -> tuple[int, str]:
    """(parts of a pass after the fallback, a warning or "") on devices of ``room`` bytes: as few equal parts as fit.

    There is no warning where a whole pass fits, nor where the run's own precision does not fit either.
    """
    fallback = MODES[config.train.precision].fallback
    if fallback is None or not config.guard.enabled:
        return 1, ""
    samples = micro_batches(config.train, world)[0]

    def need(mode: str, samples: int) -> float:
        return rank_memory(config, mode, samples, world, device)

    most = need(fallback, samples)
    if most <= room:
        return 1, ""
    least = need(fallback, 1)
    # The peak is the largest of sums that grow evenly with the samples: between two sizes it lies below the line of theirs
    divisors = (parts for parts in range(2, samples) if samples % parts == 0)
    parts = next((parts for parts in divisors if _between(least, most, samples // parts, samples) <= room), samples)
    if need(config.train.precision, samples) > room:
        return parts, ""
    needs = f"{fallback.upper()} after a fallback needs about {_gb(most)} of {_gb(room)}"
    if least > room:
        return samples, f"{needs}, with one sample a pass still {_gb(least)}: it may run out of memory"
    return parts, f"{needs}: it will run each pass in {parts} parts (micro_batch {samples} as {parts} x {samples // parts})"


def _between(least: float, most: float, samples: int, whole: int) -> float:
    return least + (most - least) * (samples - 1) / (whole - 1)


def _gb(size: float) -> str:
    return f"{size / 1e9:.{0 if size >= 10e9 else 1}f} GB"


def device_memory(device: torch.device) -> int:
    """Bytes that this rank can have: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // dist.local_world()


def fallback_splits(config: Config, device: torch.device) -> int:
    """Parts of a pass after the fallback, for the rank with the least memory: every rank calls this and gets the same number.
    Rank 0 says what is to be known of it."""
    room = min(dist.gather_objects(device_memory(device)))
    splits, warning = dist.on_rank_0(lambda: _or_whole(lambda: plan_fallback(config, dist.world(), device, room)))
    if warning:
        dist.say(f"memory: {warning}")
    return splits


def _or_whole(plan: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """Tensors without memory stand on PyTorch's inner workings: where they fail, that is said, and no run ends of it."""
    try:
        return plan()
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return 1, f"what a fallback needs cannot be reckoned here ({why}); it will run whole passes, and may run out of memory"
