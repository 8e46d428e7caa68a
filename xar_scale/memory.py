"""Memory of a rank, reckoned before it is taken: in how many parts a pass fits after the guard's fall back to TF32."""

import math
import os
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xar_scale import dist
from xar_scale.config import Config, ModelConfig, TrainConfig, micro_batches, read_settings, shard_ranks
from xar_scale.ema import WIDTHS
from xar_scale.flow import velocity_loss
from xar_scale.model.cpu import standing_for_a_gpu
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import blank_weights, meta_model
from xar_scale.precision import FP32, MODES

WEIGHT = 4  # bytes of one: masters, gradients, moments and averages are float32
ZERO3_LIVE = 10**9  # weights that it keeps gathered: its default stage3_max_live_parameters and stage3_max_reuse_distance
MARGIN = 1.1  # CUDA's context, NCCL's buffers, what the allocator cannot use


class PassMemory(NamedTuple):
    """Bytes on the device, beside weights and their gradients: what the forward pass leaves for the backward pass, and the most
    at any moment of each of the two."""

    saved: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


class Weights(NamedTuple):
    """How many a network has: the shapes of its tensors in each block, and of those in none."""

    inside: tuple[torch.Size, ...]
    blocks: int
    outside: tuple[torch.Size, ...]

    @property
    def block(self) -> int:
        return sum(map(math.prod, self.inside))

    @property
    def whole(self) -> int:
        return self.blocks * self.block + sum(map(math.prod, self.outside))

    @property
    def largest(self) -> int:
        return max(map(math.prod, (*self.inside, *self.outside)))

    def cut(self, engine: str, ranks: int) -> int:
        """Elements of all parts, as many of each tensor and equal, the last ones padded; FSDP2's are of whole rows."""
        return self.blocks * padded(self.inside, engine, ranks) + padded(self.outside, engine, ranks)


def padded(shapes: Sequence[torch.Size], engine: str, ranks: int) -> int:
    pieces = ((shape[0], math.prod(shape[1:])) if engine == "fsdp2" else (math.prod(shape), 1) for shape in shapes)
    return sum(ranks * -(-count // ranks) * size for count, size in pieces)


@cache
def weights_of(config: ModelConfig) -> Weights:
    model = meta_model(config)
    own = {id(parameter) for block in model.blocks for parameter in block.parameters()}
    outside = tuple(parameter.shape for parameter in model.parameters() if id(parameter) not in own)
    return Weights(tuple(parameter.shape for parameter in model.blocks[0].parameters()), len(model.blocks), outside)


class RankMemory(NamedTuple):
    """Bytes on the device at the moment of a step that needs most, by part."""

    parameters: float  # float32 masters; under ZeRO-3 also what is gathered from
    moments: float
    averages: float
    gradients: float  # reduced
    gathered: float = 0  # weights of other ranks, those there at once
    unreduced: float = 0  # gradients on their way to the ranks that keep them
    activations: float = 0  # all else of a pass, at most
    optimizer: float = 0  # temporaries of its step: ZeRO-3's copy of a sub-group's gradients, and on a CPU AdamW's

    @property
    def total(self) -> float:
        """And a tenth more."""
        return MARGIN * sum(self)


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


class _FusedKernels(TorchFunctionMode):
    """What a GPU's kernels keep for the backward pass, on CPU tensors: of attention its inputs, output and a number a row, of
    dropout a byte an element."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else args[0].dtype
            return _FLASH(*(tensor.to(dtype) for tensor in args), dropout_p=kwargs["dropout_p"])[0]  # a mask is little
        if function is F.dropout:
            x, share = args[0], kwargs["p"]
            return torch.native_dropout(x, share, True)[0] if share else x
        return function(*args, **kwargs)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def pass_memory(config: Config, mode: str, samples: int, device: torch.device) -> PassMemory:
    """Of one pass of ``samples`` in precision ``mode``: the network's own, forward and backward, on tensors without memory.

    Gradients of weights are let go of as they come. Copies of weights that autocast makes and keeps count, except with engines
    that gather weights in 16 bits already. FlexAttention and apex, which take no such tensors, are stood for by what keeps as
    much: attention by entities, and PyTorch's norm. Where ``device`` is a GPU and there is none, whose backward pass even such
    tensors need, a CPU's stand for them, with what a GPU's kernels keep, and one masked call for this project's own attention.
    """
    precision = MODES[mode]
    model = meta_model(config.model)
    layout = model.layout
    absent = device.type == "cuda" and not torch.cuda.is_available()
    attention = config.kernels.attention
    if attention == "flex":
        attention = "prefix"
    elif absent and attention in ("auto", "flash"):
        attention = "masked"
    kernels = replace(config.kernels, attention=attention, library="torch")
    model.use_kernels(kernels, device, precision.compute, training=True)
    inputs: list[int] = []
    if absent:
        device = torch.device("cpu")
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].nbytes))
            block.forward = partial(_fused, block.forward)  # type: ignore[method-assign]
    apply_recompute(model.blocks, config.train.recompute)
    layout.on(device)  # real, and made here: their making reads values
    gathered = FP32 if config.train.engine == "single" else precision.gather
    # DeepSpeed gathers the weights of Linear layers in 16 bits, FSDP2 those of blocks
    sources = model.blocks if config.train.engine == "fsdp2" else [model]
    lowered = {layer for source in sources for layer in source.modules() if isinstance(layer, nn.Linear)}
    living = _Living(device)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for weight in blank_weights(model):
            cast = weight.value.to(gathered) if weight.module in lowered else weight.value
            weight._replace(value=cast).place(device).register_post_accumulate_grad_hook(_let_go)
        latents = torch.zeros(samples, config.model.channels, *layout.grid, device=device)
        noise = torch.zeros(samples, layout.tokens, config.model.channels, device=device)
        t = torch.zeros(samples, layout.entities, device=device)
        labels = torch.zeros(samples, dtype=torch.int64, device=device)
        living.ignore(*model.parameters(), latents, noise, t, labels)
        stack.enter_context(living)
        with torch.autocast(device.type, dtype=precision.compute, enabled=precision.compute is not FP32):
            loss = velocity_loss(model, layout, latents, noise, t, labels)
        saved, forward = living.bytes, living.peak
        living.peak = saved
        loss.backward()
    backward = living.peak
    if absent and config.train.recompute == "offload":  # all but the one at work on are in the host's memory
        gone = sum(inputs) - max(inputs)
        return PassMemory(saved - sum(inputs), forward - gone, backward - gone)
    return PassMemory(saved, forward, backward)


def _fused(forward: Callable[..., Any], *arguments: Any) -> Any:
    with standing_for_a_gpu(), _FusedKernels():
        return forward(*arguments)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


def rank_memory(
    config: Config,
    mode: str,
    samples: int,
    world: int,
    device: torch.device,
    passes: "Passes | None" = None,
    bucket: int | None = None,
) -> RankMemory:
    """What a rank of ``world`` needs for passes of ``samples`` in ``mode``; ``passes`` is used for ``pass_memory``.

    Its share of the state, and the largest of what the backward pass takes and the optimizer's step: the pass where it begins
    and, under FSDP2, after a block or two, and where it ends.
    With engines that cut weights a pass has what is gathered at once and gradients before they are reduced: under FSDP2 of two
    blocks and of what is in no block; ZeRO-3 gathers up to its own bound, and has a bucket of gradients a dtype, of ``bucket``
    elements or as its file has it.
    """
    train, precision = config.train, MODES[mode]
    weights, ranks, engine = weights_of(config.model), shard_ranks(train, world), train.engine
    owners = world if engine == "deepspeed" else ranks  # also where neighbours have copies of ZeRO-3's weights
    share = parameters = weights.cut(engine, owners) / owners
    outside, inside = (padded(shapes, engine, ranks) for shapes in (weights.outside, weights.inside))
    gathered = unreduced = flat = one = last = 0.0
    if engine == "deepspeed":
        bucket = bucket or reduce_bucket(train)
        parameters = 2 * share + (weights.whole / ranks if ranks != world else 0)
        gathered = WEIGHT * max(outside + 2 * inside, min(weights.whole, ZERO3_LIVE))  # in 16 bits on their way only
        unreduced = last = bucket * sum(dtype.itemsize for dtype in {FP32, precision.gather}) + WEIGHT * weights.largest
        flat = min(share, ZERO3_LIVE)  # its sub-groups are as large
    elif engine == "fsdp2":
        gathered = outside * WEIGHT + 2 * inside * precision.gather.itemsize
        one = inside * precision.reduce.itemsize
        last = max(one, outside * precision.reduce.itemsize)  # in no block: they come when all blocks' are reduced
    # AdamW's temporaries: fused, a GPU's, has none; a CPU's two of one tensor
    optimizer = 0 if device.type == "cuda" else 2 * (flat or weights.largest / ranks)
    state = {
        "parameters": WEIGHT * parameters,
        "moments": WEIGHT * 2 * share,
        "averages": WEIGHT * share * (1 + (len(WIDTHS) if config.optim.ema_snapshots_every else 0)),
    }
    gradients, several = WEIGHT * share, micro_batches(train, world)[1] > 1
    peak = (passes or pass_memory)(config, mode, samples, device)
    activations: float = peak.peak
    if engine == "fsdp2":  # a block's gradients come as its activations go, and are sent beside the next block's pass
        kept = peak.saved / weights.blocks
        times = (peak.peak, 0.0), (peak.peak - kept, one), (peak.saved - 2 * kept, 2 * one)
        activations, unreduced = max(times, key=sum)
    passing = RankMemory(
        **state,
        gradients=gradients if several or engine == "deepspeed" else 0,  # else they come as activations go
        gathered=gathered,
        unreduced=unreduced,
        activations=activations,
    )
    ending = passing._replace(gradients=gradients, unreduced=last, activations=peak.peak - peak.saved)
    buckets = unreduced if engine == "deepspeed" else 0
    stepping = RankMemory(**state, gradients=gradients, unreduced=buckets, optimizer=WEIGHT * (flat + optimizer))
    return max(passing, ending, stepping, key=sum)


def reduce_bucket(train: TrainConfig) -> int:
    """Elements of the bucket that ZeRO gathers gradients in: of the run's file, or DeepSpeed's own."""
    return int(read_settings(train.ds_config).get("zero_optimization", {}).get("reduce_bucket_size", 500_000_000))


Passes = Callable[[Config, str, int, torch.device], PassMemory]
SHALLOW, DEEPER = 1, 2  # blocks of the encoder, and of the decoder


@cache
def extrapolated_passes() -> Passes:
    """``pass_memory`` of any depth and number of samples, from shallow ones of the powers of 8 around it, that are kept.

    Bytes of the forward pass grow evenly with blocks, and so do those of the backward pass. In samples each is the largest of
    sums that grow evenly: between two sizes it lies below the line of theirs, and beyond them it may lie above.
    """
    known: dict[Any, PassMemory] = {}

    def measured(config: Config, mode: str, samples: int, device: torch.device, depth: int) -> PassMemory:
        lowered = config.train.engine if MODES[mode].gather is not FP32 else ""
        model = replace(config.model, depth_encoder=depth, depth_decoder=depth)
        key = (model, config.kernels, config.train.recompute, lowered, mode, device, samples)
        if key not in known:
            known[key] = pass_memory(replace(config, model=model), mode, samples, device)
        return known[key]

    def passes(config: Config, mode: str, samples: int, device: torch.device) -> PassMemory:
        few = 8 ** ((samples.bit_length() - 1) // 3)  # the largest power of 8 that is no more
        share = (samples - few) / (7 * few)
        deep = ((config.model.depth_encoder + config.model.depth_decoder) / 2 - SHALLOW) / (DEEPER - SHALLOW)

        def at(size: int) -> list[float]:
            pairs = zip(*(measured(config, mode, size, device, depth) for depth in (SHALLOW, DEEPER)), strict=True)
            return [_line(shallow, deeper, deep) for shallow, deeper in pairs]

        ends = zip(at(few), at(8 * few) if share else at(few), strict=True)
        return PassMemory(*(round(_line(low, high, share)) for low, high in ends))

    return passes


def _line(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def plan_fallback(
    config: Config,
    world: int,
    device: torch.device,
    room: float,
    passes: Passes | None = None,
    bucket: int | None = None,
) -> tuple[int, str]:
    """(parts of a pass after the fallback, a warning or "") on devices of ``room`` bytes: as few equal parts as fit.

    There is no warning where a whole pass fits, nor where the run's own precision does not fit either.
    """
    fallback = MODES[config.train.precision].fallback
    if fallback is None or not config.guard.enabled:
        return 1, ""
    samples = micro_batches(config.train, world)[0]

    def need(mode: str, samples: int) -> float:
        return rank_memory(config, mode, samples, world, device, passes, bucket).total

    most = need(fallback, samples)
    if most <= room:
        return 1, ""
    least = need(fallback, 1)
    # The peak is the largest of sums that grow evenly with the samples: between two sizes it lies below the line of theirs
    divisors = (parts for parts in range(2, samples) if samples % parts == 0)
    parts = next((parts for parts in divisors if _line(least, most, (samples // parts - 1) / (samples - 1)) <= room), samples)
    if need(config.train.precision, samples) > room:
        return parts, ""
    needs = f"{fallback.upper()} after a fallback needs about {_gb(most)} of {_gb(room)}"
    if least > room:
        return samples, f"{needs}, with one sample a pass still {_gb(least)}: it may run out of memory"
    return parts, f"{needs}: it will run each pass in {parts} parts (micro_batch {samples} as {parts} x {samples // parts})"


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
