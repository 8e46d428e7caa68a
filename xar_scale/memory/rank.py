"""Peak memory of a rank during a step, by part."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from xar_scale.config import Config, ModelConfig, TrainConfig, micro_batches, read_settings, shard_ranks
from xar_scale.ema import ema_count
from xar_scale.memory.passes import PassEstimator, pass_memory
from xar_scale.model.xar import meta_model
from xar_scale.precision import FP32, MODES

WEIGHT = 4  # bytes: master weights, gradients, Adam moments and EMA are float32
# Weights that ZeRO-3 keeps gathered: the default of stage3_max_live_parameters and stage3_max_reuse_distance
ZERO3_LIVE = 10**9
MARGIN = 1.1  # for CUDA's context, NCCL's buffers and the allocator's fragmentation


class Weights(NamedTuple):
    """A network's parameter shapes: those of each of its equal blocks, and those outside blocks."""

    block_shapes: tuple[torch.Size, ...]
    blocks: int
    other_shapes: tuple[torch.Size, ...]

    @property
    def block(self) -> int:
        return sum(map(math.prod, self.block_shapes))

    @property
    def total(self) -> int:
        return self.blocks * self.block + sum(map(math.prod, self.other_shapes))

    @property
    def largest(self) -> int:
        return max(map(math.prod, (*self.block_shapes, *self.other_shapes)))

    def padded_total(self, engine: str, ranks: int) -> int:
        """Elements over all ranks when the weights are sharded evenly, padding included: each tensor by elements (FSDP2: by
        rows), or for DDP all tensors as one vector."""
        if engine == "ddp":
            return ranks * -(-self.total // ranks)
        return self.blocks * padded(self.block_shapes, engine, ranks) + padded(self.other_shapes, engine, ranks)


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
    """Bytes on the device at the peak of a step, by part."""

    parameters: float  # float32 master weights; under ZeRO-3 also the copy that is gathered from
    moments: float
    ema: float
    gradients: float  # reduced
    gathered: float = 0  # weights of other ranks that are live at once
    unreduced: float = 0  # gradients not yet reduced to the ranks that keep them
    activations: float = 0  # peak of everything else in forward and backward
    optimizer: float = 0  # temporaries: ZeRO-3's copy of a sub-group's gradients; on a CPU also AdamW's

    @property
    def total(self) -> float:
        """The sum times MARGIN."""
        return MARGIN * sum(self)


def state_shard_ranks(train: TrainConfig, world: int) -> int:
    """Number of ranks that weights and moments are sharded over. Under ZeRO-3 that is all ranks, with hpZ too."""
    return world if train.engine == "deepspeed" else shard_ranks(train, world)


def rank_memory(
    config: Config,
    mode: str,
    samples: int,
    world: int,
    device: torch.device,
    estimate_pass: PassEstimator = pass_memory,
    bucket: int | None = None,
) -> RankMemory:
    """Return the peak memory of a rank of ``world`` in precision ``mode``, with micro-batches of ``samples``; a step has
    as many as make up the rank's share of the global batch.

    The peak is the state plus the largest of: the start of the backward pass (under FSDP2 also after a block or two), its end,
    and the optimizer step. DDP holds all weights, and accumulated gradients of all of them.

    Engines that shard weights add gathered weights and unreduced gradients: FSDP2 those of two blocks and of the parameters
    outside blocks; ZeRO-3 weights up to ZERO3_LIVE, and one gradient bucket per dtype, of ``bucket`` elements (default: from
    its settings file).
    """
    train, precision = config.train, MODES[mode]
    weights, ranks, engine = weights_of(config.model), shard_ranks(train, world), train.engine
    state_ranks = state_shard_ranks(train, world)
    share = parameters = weights.padded_total(engine, state_ranks) / state_ranks
    outside, inside = (padded(shapes, engine, ranks) for shapes in (weights.other_shapes, weights.block_shapes))
    gathered = unreduced = flat = one = last = 0.0
    piece = weights.largest / ranks  # the largest tensor that the optimizer updates at once
    if engine == "ddp":
        parameters, piece = weights.total, min(weights.largest, share)
    elif engine == "deepspeed":
        bucket = bucket or reduce_bucket(train)
        parameters = 2 * share + (weights.total / ranks if ranks != world else 0)
        gathered = WEIGHT * max(outside + 2 * inside, min(weights.total, ZERO3_LIVE))  # 16 bits only while they are sent
        unreduced = last = bucket * sum(dtype.itemsize for dtype in {FP32, precision.gather}) + WEIGHT * weights.largest
        piece = flat = min(share, ZERO3_LIVE)  # the size of its sub-groups
    elif engine == "fsdp2":
        gathered = outside * WEIGHT + 2 * inside * precision.gather.itemsize
        one = inside * precision.reduce.itemsize
        last = max(one, outside * precision.reduce.itemsize)  # outside blocks: they appear when those of all blocks are reduced
    optimizer = 0 if device.type == "cuda" else 2 * piece  # AdamW's temporaries; the fused one on GPUs has none
    state = {
        "parameters": WEIGHT * parameters,
        "moments": WEIGHT * 2 * share,
        "ema": WEIGHT * share * ema_count(config.optim),
    }
    # with one micro-batch gradients appear as activations are freed; with more, and in these engines, accumulated ones are kept
    accumulated = engine in ("deepspeed", "ddp") or samples < math.prod(micro_batches(train, world))
    gradients = WEIGHT * (weights.total if engine == "ddp" else share)
    peak = estimate_pass(config, mode, samples, device)
    activations: float = peak.peak
    if engine == "fsdp2":  # a block's gradients replace its activations, and are reduced during the next block's backward
        kept = peak.saved / weights.blocks
        times = (peak.peak, 0.0), (peak.peak - kept, one), (peak.saved - 2 * kept, 2 * one)
        activations, unreduced = max(times, key=sum)
    at_start = RankMemory(
        **state,
        gradients=gradients if accumulated else 0,
        gathered=gathered,
        unreduced=unreduced,
        activations=activations,
    )
    at_end = at_start._replace(gradients=gradients, unreduced=last, activations=peak.peak - peak.saved)
    buckets = unreduced if engine == "deepspeed" else 0
    in_optimizer = RankMemory(**state, gradients=gradients, unreduced=buckets, optimizer=WEIGHT * (flat + optimizer))
    return max(at_start, at_end, in_optimizer, key=sum)


def reduce_bucket(train: TrainConfig) -> int:
    """Elements of ZeRO's reduce bucket: from the run's settings file, or DeepSpeed's default."""
    return int(read_settings(train.ds_config).get("zero_optimization", {}).get("reduce_bucket_size", 500_000_000))
