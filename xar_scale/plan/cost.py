"""Pure functions of a step: what is computed, sent, read and written, and the seconds that each takes."""

import math
from typing import NamedTuple

from xar_scale.config import Config, micro_batches, shard_ranks
from xar_scale.ema import averages_of
from xar_scale.graphs import records
from xar_scale.memory.rank import WEIGHT, ZERO3_LIVE, Weights, padded, state_shard_ranks
from xar_scale.model.entities import create_layout
from xar_scale.model.flops import forward_flops, training_flops
from xar_scale.plan.hardware import Machines
from xar_scale.precision import MODES


class Link(NamedTuple):
    """What a ring of ranks sends through: bytes a second, seconds a hop."""

    bandwidth: float
    hop: float


class Collective(NamedTuple):
    """One kind of collective of a step, over ``ranks``, as ``calls`` of about one size that together move ``size`` bytes."""

    name: str
    size: float  # of what is gathered, or reduced
    ranks: int
    calls: int
    link: Link
    rounds: int = 1  # an all-reduce is a reduce-scatter and an all-gather

    @property
    def bytes_sent(self) -> float:
        """Bytes that each rank sends, and receives: size (n - 1) / n, the ring's."""
        return self.rounds * self.size * (self.ranks - 1) / self.ranks

    @property
    def seconds(self) -> float:
        """sent / bandwidth + calls (n - 1) hop: each call goes once around the ring."""
        return self.bytes_sent / self.link.bandwidth + self.rounds * self.calls * (self.ranks - 1) * self.link.hop


def link_of(machines: Machines, ranks: int) -> Link:
    """The slowest that a ring of ``ranks`` neighbours goes through. Within a node NVLink; between nodes all adapters of a node,
    a ring each: per_node x network, where NVLink is not slower. A hop within a node takes a tenth of one between them, and of
    per_node hops one is: (1 + (per_node - 1) / 10) hop / per_node.
    """
    gpu, near = machines.gpu, machines.hop / 10
    if ranks <= machines.per_node:
        return Link(gpu.nvlink * machines.link_share, near)
    hop = near + (machines.hop - near) / machines.per_node
    return Link(min(gpu.nvlink, machines.per_node * gpu.network) * machines.link_share, hop)


def step_collectives(config: Config, weights: Weights, machines: Machines) -> list[Collective]:
    """Of one step of p passes: in each weights are gathered for the forward pass and again for the backward pass, and
    gradients reduced.

    W weights, padded, in 16 bits or 32 (precision.gather), a call a block and one for what is in none. FSDP2 gathers what is in
    none in float32 and keeps it for the backward pass, and reduces in float32; ZeRO-3 reduces in the type it gathers in, and
    keeps what the backward pass uses within ZERO3_LIVE weights. ``shard_ranks``: FSDP2 gathers and reduces among neighbours,
    and all-reduces its shard with the ranks of other nodes that have the same; ZeRO-3's hpZ gathers from all ranks in a
    step's first forward pass, else from neighbours. DDP's are one reduction and one gather of all weights, in float32.
    """
    train, world, precision = config.train, machines.gpus, MODES[config.train.precision]
    if train.engine == "single" or world == 1:
        return []
    if train.engine == "ddp":
        everything, link = WEIGHT * weights.padded_total(train.engine, world), link_of(machines, world)
        return [Collective(name, everything, world, 1, link) for name in ("reduce", "gather")]
    passes = micro_batches(train, world)[1]
    ranks, calls, everywhere = shard_ranks(train, world), weights.blocks + 1, link_of(machines, world)
    near = link_of(machines, ranks)
    inside, outside = (padded(shapes, train.engine, ranks) for shapes in (weights.block_shapes, weights.other_shapes))
    blocks = weights.blocks * inside * precision.gather.itemsize
    if train.engine == "deepspeed":
        whole = passes * (blocks + outside * precision.gather.itemsize)
        again = max(0.0, 1 - ZERO3_LIVE / 2 / weights.total)  # of it: it lies as far back as ahead
        near_forward = whole * (1 - 1 / passes) if ranks != world else 0.0
        found = [
            Collective("gather forward", whole - near_forward, world, calls if near_forward else passes * calls, everywhere),
            Collective("gather forward near", near_forward, ranks, (passes - 1) * calls, near),
            Collective("gather backward", whole * again, ranks, math.ceil(passes * calls * again), near),
            Collective("reduce", whole, world, passes * calls, everywhere),
        ]
        return [each for each in found if each.size]
    reduced = passes * (weights.blocks * inside + outside) * precision.reduce.itemsize
    found = [
        Collective("gather forward", passes * (blocks + outside * WEIGHT), ranks, passes * calls, near),
        Collective("gather backward", passes * blocks, ranks, passes * weights.blocks, near),
        Collective("reduce", reduced, ranks, passes * calls, near),
    ]
    if ranks != world:
        # ranks of other nodes by this one's own adapter; where all are in one node, by NVLink
        apart = Link(machines.gpu.network * machines.link_share, machines.hop)
        across = everywhere if world <= machines.per_node else apart
        found.append(Collective("reduce copies", reduced / ranks, world // ranks, passes * calls, across, rounds=2))
    return found


class StepTime(NamedTuple):
    """Seconds of one step, by part. What runs beside something longer is hidden by it."""

    compute: float
    communication: float  # all of it
    offload: float  # activations to the host's memory and back
    launches: float  # of kernels, one after another, by the host
    exposed: float  # of communication, what nothing is computed beside
    optimizer: float
    data: float  # until the loaders have a global batch

    @property
    def overlapped(self) -> float:
        """max(compute, communication - exposed, offload, launches)."""
        return max(self.compute, self.communication - self.exposed, self.offload, self.launches)

    @property
    def total(self) -> float:
        """max(overlapped + exposed + optimizer, data)."""
        return max(self.overlapped + self.exposed + self.optimizer, self.data)


def image_flops(config: Config) -> int:
    """Of one image in training: forward and backward, and the forward pass once more where blocks are computed again. What
    "selective" computes again has no matrix products to speak of."""
    again = forward_flops(config.model) if config.train.recompute in ("full", "offload") else 0
    return training_flops(config.model) + again


def step_time(config: Config, weights: Weights, machines: Machines, collectives: list[Collective]) -> StepTime:
    """Each part by its formula; b samples a rank and pass, p passes.

    compute = p b FLOPs / (peak x mfu); communication = that of all collectives; offload = 2 p b x inputs of blocks / host link;
    launches = p x blocks x launch x recompute_launch_factor, without CUDA graphs, x REPLICATED_LAUNCH_FACTOR if replicated;
    exposed = one call of the first gather and of the last reduction, and of the rest what is not overlapped;
    data = global batch / (loader x workers x ranks).
    """
    train, gpu = config.train, machines.gpu
    samples, passes = micro_batches(train, machines.gpus)
    inputs = 0.0
    if train.recompute == "offload":
        inputs = weights.blocks * create_layout(config.model).tokens * config.model.width * WEIGHT
    launch = machines.launch * (REPLICATED_LAUNCH_FACTOR if train.whole_weights else 1) * recompute_launch_factor(config)
    workers = max(config.data.workers, 1) * machines.gpus
    communication = sum(each.seconds for each in collectives)
    ends = sum(each.seconds / each.calls for each in (collectives[0], collectives[-1])) if collectives else 0.0
    return StepTime(
        compute=passes * samples * image_flops(config) / (gpu.peak(train.precision) * machines.mfu),
        communication=communication,
        offload=2 * passes * samples * inputs / gpu.host_link,
        launches=0.0 if records(config, train.precision) else passes * weights.blocks * launch,
        exposed=ends + (1 - machines.overlap) * (communication - ends),
        optimizer=optimizer_bytes(config, weights, machines.gpus) / gpu.memory_bandwidth,
        data=train.global_batch / (machines.loader * workers),
    )


def recompute_launch_factor(config: Config) -> float:
    """What recomputation multiplies a pass's launches by, as a CPU's host had it (docs/benchmarks/2026-11-27-cpu-ddp.md)."""
    if config.train.recompute in ("full", "offload"):
        return 1.5
    # graphs have it in them; without, Python decides of each operation
    return 2.0 if config.train.recompute == "selective" and not config.kernels.compile else 1.0


def optimizer_bytes(config: Config, weights: Weights, world: int) -> float:
    """Read and written a rank and step, of its share: weights, to see whether they are finite (1), gradients for the norm (1)
    and to be clipped (2), AdamW's four tensors (4 read, 3 written), the averages (3 each); under ZeRO-3 the copy that is
    gathered from (2). Under DDP the ranks' mean (2), and of all weights each pass's gradients, put where they are reduced (2,
    or 3 where there are some). Four bytes each."""
    times = 11 + 3 * averages_of(config.optim) + (2 if config.train.engine in ("deepspeed", "ddp") else 0)
    ranks = state_shard_ranks(config.train, world)
    put = 3 * micro_batches(config.train, world)[1] - 1 if config.train.engine == "ddp" else 0
    return WEIGHT * (times * weights.padded_total(config.train.engine, ranks) / ranks + put * weights.total)


class Checkpoint(NamedTuple):
    """Weights, two moments and the averages, float32. Seconds: to copy a rank's share to the host, to write it all."""

    size: float
    copy: float
    write: float


def checkpoint(config: Config, weights: Weights, machines: Machines) -> Checkpoint:
    """size = 4 W (3 + averages); copy = size / ranks / host link; write = size / (disk x nodes)."""
    size = WEIGHT * weights.total * (3 + averages_of(config.optim))
    return Checkpoint(size, size / machines.gpus / machines.gpu.host_link, size / (machines.disk * machines.nodes))


def snapshot_bytes(config: Config, weights: Weights, machines: Machines) -> float:
    """Of a node's memory: the guard's snapshots of all that a rank owns, and the copy of what it writes to a checkpoint, which
    where several ranks own the same is a part of it."""
    size, world = checkpoint(config, weights, machines).size, machines.gpus
    snapshots = config.guard.snapshots if config.guard.enabled else 0
    return min(machines.per_node, world) * (snapshots * size / state_shard_ranks(config.train, world) + size / world)


def sample_bytes(config: Config) -> int:
    """On disk: the posterior's mean and log variance in float16, and a tar's headers."""
    rows, columns = config.model.grid
    return 2 * 2 * config.model.channels * rows * columns + HEADERS


# A block's own kernels, of all that FSDP2 launches for it: 164 of 246 ms and 290 of 406, on two hosts (docs/benchmarks)
REPLICATED_LAUNCH_FACTOR = 0.7
HEADERS = 4 * 512  # of the latents' member and of the label's, whose 512 bytes follow
