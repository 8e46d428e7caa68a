"""What a rank needs at the moment of a step that needs most, part by part."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from xar_scale.config import Config, ModelConfig, TrainConfig, micro_batches, read_settings, shard_ranks
from xar_scale.ema import averages_of
from xar_scale.memory.passes import PassEstimator, pass_memory
from xar_scale.model.xar import meta_model
from xar_scale.precision import FP32, MODES

WEIGHT = 4  # bytes of one: masters, gradients, moments and averages are float32
ZERO3_LIVE = 10**9  # weights that it keeps gathered: its default stage3_max_live_parameters and stage3_max_reuse_distance
MARGIN = 1.1  # CUDA's context, NCCL's buffers, what the allocator cannot use


class Weights(NamedTuple):
    """How many a network has: the shapes of its tensors in each block, and of those in none."""

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
        """Elements of all parts, as many of each tensor and equal, the last ones padded; FSDP2's are of whole rows, DDP's of
        all tensors together."""
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
    """Bytes on the device at the moment of a step that needs most, by part."""

    parameters: float  # float32 masters; under ZeRO-3 also what is gathered from
    moments: float
    ema: float
    gradients: float  # reduced
    gathered: float = 0  # weights of other ranks, those there at once
    unreduced: float = 0  # gradients on their way to the ranks that keep them
    activations: float = 0  # all else of a pass, at most
    optimizer: float = 0  # temporaries of its step: ZeRO-3's copy of a sub-group's gradients, and on a CPU AdamW's

    @property
    def total(self) -> float:
        """And a tenth more."""
        return MARGIN * sum(self)


def state_shard_ranks(train: TrainConfig, world: int) -> int:
    """Ranks that a copy of weights and moments is cut over: under ZeRO-3 all, also where neighbours gather from each other."""
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
    """What a rank of ``world`` needs for passes of ``samples`` in ``mode``, of which a step has as many as make up its part of
    the global batch; ``estimate_pass`` is used for ``pass_memory``.

    Its share of the state, and the largest of what the backward pass takes and the optimizer's step: the pass where it begins
    and, under FSDP2, after a block or two, and where it ends. DDP has all weights, and of all gradients the sums.
    With engines that cut weights a pass has what is gathered at once and gradients before they are reduced: under FSDP2 of two
    blocks and of what is in no block; ZeRO-3 gathers up to its own bound, and has a bucket of gradients a dtype, of ``bucket``
    elements or as its file has it.
    """
    train, precision = config.train, MODES[mode]
    weights, ranks, engine = weights_of(config.model), shard_ranks(train, world), train.engine
    holders = state_shard_ranks(train, world)
    share = parameters = weights.padded_total(engine, holders) / holders
    outside, inside = (padded(shapes, engine, ranks) for shapes in (weights.other_shapes, weights.block_shapes))
    gathered = unreduced = flat = one = last = 0.0
    piece = weights.largest / ranks  # the most that an optimizer has at once
    if engine == "ddp":
        parameters, piece = weights.total, min(weights.largest, share)
    elif engine == "deepspeed":
        bucket = bucket or reduce_bucket(train)
        parameters = 2 * share + (weights.total / ranks if ranks != world else 0)
        gathered = WEIGHT * max(outside + 2 * inside, min(weights.total, ZERO3_LIVE))  # in 16 bits on their way only
        unreduced = last = bucket * sum(dtype.itemsize for dtype in {FP32, precision.gather}) + WEIGHT * weights.largest
        piece = flat = min(share, ZERO3_LIVE)  # its sub-groups are as large
    elif engine == "fsdp2":
        gathered = outside * WEIGHT + 2 * inside * precision.gather.itemsize
        one = inside * precision.reduce.itemsize
        last = max(one, outside * precision.reduce.itemsize)  # in no block: they come when all blocks' are reduced
    optimizer = 0 if device.type == "cuda" else 2 * piece  # AdamW's temporaries; fused, a GPU's, has none
    state = {
        "parameters": WEIGHT * parameters,
        "moments": WEIGHT * 2 * share,
        "ema": WEIGHT * share * averages_of(config.optim),
    }
    # those of one pass come as activations go; of more than one, and where an engine sums them up elsewhere, the sums are there
    sums = engine in ("deepspeed", "ddp") or samples < math.prod(micro_batches(train, world))
    gradients = WEIGHT * (weights.total if engine == "ddp" else share)
    peak = estimate_pass(config, mode, samples, device)
    activations: float = peak.peak
    if engine == "fsdp2":  # a block's gradients come as its activations go, and are sent beside the next block's pass
        kept = peak.saved / weights.blocks
        times = (peak.peak, 0.0), (peak.peak - kept, one), (peak.saved - 2 * kept, 2 * one)
        activations, unreduced = max(times, key=sum)
    passing = RankMemory(
        **state,
        gradients=gradients if sums else 0,
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
