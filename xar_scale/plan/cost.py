"""Pure functions for the cost of a step: FLOPs computed, bytes sent, read and written, and the seconds each takes."""

import math
from typing import NamedTuple

from xar_scale.config import Config, micro_batches, shard_ranks
from xar_scale.ema import ema_count
from xar_scale.graphs import can_capture
from xar_scale.memory.rank import WEIGHT, ZERO3_LIVE, Weights, padded, state_shard_ranks
from xar_scale.model.entities import create_layout
from xar_scale.model.flops import forward_flops, training_flops
from xar_scale.plan.hardware import Machines
from xar_scale.precision import MODES


class Link(NamedTuple):
    """The link that a ring of ranks sends through: bytes per second, seconds per hop."""

    bandwidth: float
    hop: float


class Collective(NamedTuple):
    """All collectives of one kind in a step, over ``ranks``: ``calls`` of about equal size, ``size`` bytes together."""

    name: str
    size: float  # bytes gathered or reduced
    ranks: int
    calls: int
    link: Link
    rounds: int = 1  # an all-reduce is a reduce-scatter and an all-gather
    exposed_calls: int = 0  # a step's first and last, which no computation overlaps

    @property
    def bytes_sent(self) -> float:
        """Bytes that each rank sends and receives in a ring: size (n - 1) / n."""
        return self.rounds * self.size * (self.ranks - 1) / self.ranks

    @property
    def seconds(self) -> float:
        """sent / bandwidth + calls (n - 1) hop: each call goes once around the ring."""
        return self.bytes_sent / self.link.bandwidth + self.rounds * self.calls * (self.ranks - 1) * self.link.hop


def link_of(machines: Machines, ranks: int) -> Link:
    """Return the slowest link of a ring of ``ranks`` neighbours.

    Within a node: NVLink. Between nodes: all adapters of a node, with one ring through each: per_node x network, unless NVLink
    is slower. A hop within a node takes a tenth of a hop between nodes; in a ring across nodes one hop in per_node leaves the
    node, so the mean is (1 + (per_node - 1) / 10) hop / per_node.
    """
    gpu, near = machines.gpu, machines.hop / 10
    if ranks <= machines.per_node:
        return Link(gpu.nvlink * machines.link_share, near)
    hop = near + (machines.hop - near) / machines.per_node
    return Link(min(gpu.nvlink, machines.per_node * gpu.network) * machines.link_share, hop)


def step_collectives(config: Config, weights: Weights, machines: Machines) -> list[Collective]:
    """Return the collectives of one step. Each micro-batch all-gathers the weights for the forward pass and again for the
    backward pass, and reduces the gradients.

    All padded weights are sent in 16 or 32 bits (precision.gather), with one call per block and one for the parameters outside
    blocks.
    - FSDP2 gathers the parameters outside blocks in float32, keeps them for the backward pass, and reduces in float32. With
      ``shard_ranks`` (HSDP) it gathers and reduces within the sharding group, then all-reduces its shard with its replicas.
    - ZeRO-3 reduces in the dtype it gathers in, and keeps gathered the weights that are reused within ZERO3_LIVE weights.
      With ``shard_ranks`` (hpZ) it gathers from all ranks in a step's first forward pass, else within the group.
    - DDP has one reduce-scatter and one all-gather of all weights per step, in float32.
    """
    train, world, precision = config.train, machines.gpus, MODES[config.train.precision]
    if train.engine == "single" or world == 1:
        return []
    if train.engine == "ddp":
        everything, link = WEIGHT * weights.padded_total(train.engine, world), link_of(machines, world)
        return [Collective(name, everything, world, 1, link, exposed_calls=1) for name in ("reduce-scatter", "all-gather")]
    batches = micro_batches(train, world)[1]
    ranks, calls, everywhere = shard_ranks(train, world), weights.blocks + 1, link_of(machines, world)
    near = link_of(machines, ranks)
    inside, outside = (padded(shapes, train.engine, ranks) for shapes in (weights.block_shapes, weights.other_shapes))
    blocks = weights.blocks * inside * precision.gather.itemsize
    if train.engine == "deepspeed":
        whole = batches * (blocks + outside * precision.gather.itemsize)
        # share gathered again: only weights within ZERO3_LIVE / 2 of the forward pass's end are reused within ZERO3_LIVE
        again = max(0.0, 1 - ZERO3_LIVE / 2 / weights.total)
        near_forward = whole * (1 - 1 / batches) if ranks != world else 0.0
        found = [
            Collective(
                "all-gather forward",
                whole - near_forward,
                world,
                calls if near_forward else batches * calls,
                everywhere,
                exposed_calls=1,
            ),
            Collective("all-gather forward, in group", near_forward, ranks, (batches - 1) * calls, near),
            Collective("all-gather backward", whole * again, ranks, math.ceil(batches * calls * again), near),
            Collective("reduce-scatter", whole, world, batches * calls, everywhere, exposed_calls=1),
        ]
        return [each for each in found if each.size]
    reduced = batches * (weights.blocks * inside + outside) * precision.reduce.itemsize
    found = [
        Collective("all-gather forward", batches * (blocks + outside * WEIGHT), ranks, batches * calls, near, exposed_calls=1),
        Collective("all-gather backward", batches * blocks, ranks, batches * weights.blocks, near),
        Collective("reduce-scatter", reduced, ranks, batches * calls, near, exposed_calls=1),
    ]
    if ranks != world:
        # replicas on other nodes: by the rank's own adapter; on the same node: by NVLink
        apart = Link(machines.gpu.network * machines.link_share, machines.hop)
        across = everywhere if world <= machines.per_node else apart
        replicas = world // ranks
        found.append(Collective("all-reduce replicas", reduced / ranks, replicas, batches * calls, across, 2, exposed_calls=1))
    return found


class StepTime(NamedTuple):
    """Seconds of one step, by part. Of the parts that overlap only the longest counts."""

    compute: float
    communication: float  # overlapped and exposed
    offload: float  # copies of activations to host memory and back
    launches: float  # CPU time to launch the kernels one after another
    exposed: float  # communication that does not overlap with compute
    optimizer: float
    data: float  # for the loaders to produce a global batch

    @property
    def overlapped(self) -> float:
        """max(compute, communication - exposed, offload, launches)."""
        return max(self.compute, self.communication - self.exposed, self.offload, self.launches)

    @property
    def total(self) -> float:
        """max(overlapped + exposed + optimizer, data)."""
        return max(self.overlapped + self.exposed + self.optimizer, self.data)


def image_flops(config: Config) -> int:
    """FLOPs of one image in training: forward, backward, and a second forward pass with full recomputation. What "selective"
    recomputes has next to no matrix products."""
    again = forward_flops(config.model) if config.train.recompute in ("full", "offload") else 0
    return training_flops(config.model) + again


def step_time(config: Config, weights: Weights, machines: Machines, collectives: list[Collective]) -> StepTime:
    """Return each part of a step of p micro-batches of b samples per rank:

    compute = p b FLOPs / (peak x mfu)
    communication = the sum over all collectives
    offload = 2 p b x inputs of blocks / host link, with train.recompute=offload
    launches = p x blocks x launch x recompute_launch_factor (x REPLICATED_LAUNCH_FACTOR if replicated); 0 for CUDA graphs
    exposed = the first all-gather and the last reductions (exposed_calls), and the share of the rest that does not overlap
    optimizer = optimizer_bytes / memory bandwidth
    data = global batch / (loader x workers x ranks)
    """
    train, gpu = config.train, machines.gpu
    samples, batches = micro_batches(train, machines.gpus)
    inputs = 0.0
    if train.recompute == "offload":
        inputs = weights.blocks * create_layout(config.model).tokens * config.model.width * WEIGHT
    launch = machines.launch * (REPLICATED_LAUNCH_FACTOR if train.replicated_weights else 1) * recompute_launch_factor(config)
    workers = max(config.data.workers, 1) * machines.gpus
    communication = sum(each.seconds for each in collectives)
    ends = sum(each.exposed_calls * each.seconds / each.calls for each in collectives)
    return StepTime(
        compute=batches * samples * image_flops(config) / (gpu.peak(train.precision) * machines.mfu),
        communication=communication,
        offload=2 * batches * samples * inputs / gpu.host_link,
        launches=0.0 if can_capture(config, train.precision) else batches * weights.blocks * launch,
        exposed=ends + (1 - machines.overlap) * (communication - ends),
        optimizer=optimizer_bytes(config, weights, machines.gpus) / gpu.memory_bandwidth,
        data=train.global_batch / (machines.loader * workers),
    )


def recompute_launch_factor(config: Config) -> float:
    """Factor by which recomputation multiplies launch time, as measured on a CPU (docs/benchmarks/2026-11-27-cpu-ddp.md)."""
    if config.train.recompute in ("full", "offload"):
        return 1.5
    # compiled graphs contain the recomputation; in eager blocks Python decides for each operation
    return 2.0 if config.train.recompute == "selective" and not config.kernels.compile else 1.0


def optimizer_bytes(config: Config, weights: Weights, world: int) -> float:
    """Bytes that a rank reads and writes in a step, besides forward and backward. The factors count float32 tensors.

    Of its shard: weights to check that they are finite (1), gradients for the norm (1) and for clipping (2), AdamW's four
    tensors (4 read, 3 written), each EMA (3); ZeRO-3: the copy that it gathers from (2); DDP: the mean over ranks (2).
    Of all weights, DDP only: each micro-batch's gradients, copied into the reduced vector (2) or added to it (3).
    """
    tensors = 11 + 3 * ema_count(config.optim) + (2 if config.train.engine in ("deepspeed", "ddp") else 0)
    ranks = state_shard_ranks(config.train, world)
    put = 3 * micro_batches(config.train, world)[1] - 1 if config.train.engine == "ddp" else 0
    return WEIGHT * (tensors * weights.padded_total(config.train.engine, ranks) / ranks + put * weights.total)


class Checkpoint(NamedTuple):
    """Bytes of weights, both Adam moments and the EMA weights in float32; seconds to copy a rank's share to host memory and to
    write the whole."""

    size: float
    copy: float
    write: float


def checkpoint(config: Config, weights: Weights, machines: Machines) -> Checkpoint:
    """size = 4 W (3 + number of EMAs); copy = size / ranks / host link; write = size / (disk x nodes)."""
    size = WEIGHT * weights.total * (3 + ema_count(config.optim))
    return Checkpoint(size, size / machines.gpus / machines.gpu.host_link, size / (machines.disk * machines.nodes))


def snapshot_bytes(config: Config, weights: Weights, machines: Machines) -> float:
    """Host memory per node: for each rank the guard's snapshots of its shard, and a copy of what it writes to a checkpoint.
    Of a shard that several ranks hold, each writes a part."""
    size, world = checkpoint(config, weights, machines).size, machines.gpus
    snapshots = config.guard.snapshots if config.guard.enabled else 0
    return min(machines.per_node, world) * (snapshots * size / state_shard_ranks(config.train, world) + size / world)


def sample_bytes(config: Config) -> int:
    """Bytes of a sample that are read from disk: the posterior's mean and log variance in float16, and tar headers."""
    rows, columns = config.model.grid
    return 2 * 2 * config.model.channels * rows * columns + HEADERS


# With nothing to gather a block launches only its own kernels: 164 of FSDP2's 246 ms and 290 of 406, on two hosts
# (docs/benchmarks/2026-11-27-plan.md)
REPLICATED_LAUNCH_FACTOR = 0.7
HEADERS = 4 * 512  # tar headers of latents and label, the .npy header, the label; each padded to 512
