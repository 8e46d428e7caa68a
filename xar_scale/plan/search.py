"""The candidates to run a model on some GPUs, and the cheapest that fits."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import get_args

import torch

from xar_scale.config import Config, Recompute, micro_batches
from xar_scale.errors import ConfigError
from xar_scale.memory.fallback import plan_fallback
from xar_scale.memory.passes import PassEstimator, pass_estimator
from xar_scale.memory.rank import RankMemory, Weights, rank_memory, weights_of
from xar_scale.plan.cost import Collective, StepTime, step_collectives, step_time
from xar_scale.plan.hardware import Machines
from xar_scale.precision import MODES

CUDA = torch.device("cuda", 0)
TIME_TOLERANCE = 0.02  # of a step's seconds
ENGINES = {"single": "single", "ddp": "DDP", "deepspeed": "ZeRO-3", "fsdp2": "FSDP2"}  # among equals the first
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full", "offload")  # the least work first


@dataclass(frozen=True)
class Candidate:
    """One config, and the seconds of a step."""

    config: Config
    collectives: list[Collective]
    time: StepTime

    @property
    def name(self) -> str:
        train = self.config.train
        shared = f" in groups of {train.shard_ranks}" if train.shard_ranks else ""
        compiled = ", compiled" if self.config.kernels.compile else ""
        return f"{ENGINES[train.engine]}{shared}{compiled}, recompute {train.recompute}, micro batch {train.micro_batch}"

    @property
    def time_bucket(self) -> int:
        """Of a step, the quickest's the smallest: what differs by less than is known is equal."""
        return round(math.log(self.time.total, 1 + TIME_TOLERANCE))


@dataclass(frozen=True)
class FeasibleCandidate(Candidate):
    """One that fits. ``parts``: of a pass after the guard's fall back to TF32."""

    memory: RankMemory
    parts: int


@dataclass(frozen=True)
class Search:
    """The configuration asked for, whose ``fixed`` keys are not searched, and all ``candidates``, the best first. Whether they
    fit is not known yet: that takes longer to find out."""

    config: Config
    machines: Machines
    fixed: frozenset[str]
    weights: Weights
    estimate_pass: PassEstimator
    candidates: list[Candidate]

    @cached_property
    def best(self) -> FeasibleCandidate:
        """Raises ConfigError where nothing fits."""
        best = next(self.feasible(), None)
        if best is None:
            raise ConfigError(_nothing_fits(self))
        return best

    def feasible(self) -> Iterator[FeasibleCandidate]:
        """The best first. A candidate's memory is reckoned when it is asked for."""
        for candidate in self.candidates:
            need, memory, parts = self.need(candidate.config)
            if need <= self.gpu_memory:
                yield FeasibleCandidate(candidate.config, candidate.collectives, candidate.time, memory, parts)

    def need(self, config: Config) -> tuple[float, RankMemory, int]:
        """(bytes that a GPU must have, a pass's parts of them, in how many parts passes run after the guard's fall back)."""
        train, world = config.train, self.machines.gpus
        samples, _ = micro_batches(train, world)
        memory = self.memory(config, train.precision, samples)
        fallback = MODES[train.precision].fallback
        if memory.total > self.gpu_memory or not (fallback and config.guard.enabled):
            return memory.total, memory, 1
        parts, _ = plan_fallback(config, world, CUDA, self.gpu_memory, self.estimate_pass, bucket(self.weights))
        return max(memory.total, self.memory(config, fallback, samples // parts).total), memory, parts

    def memory(self, config: Config, mode: str, samples: int) -> RankMemory:
        return rank_memory(config, mode, samples, self.machines.gpus, CUDA, self.estimate_pass, bucket(self.weights))

    def largest(self, config: Config, mode: str) -> int:
        """The largest micro batch that divides a rank's part of the global batch and fits in precision ``mode``; 0: none."""
        sizes = reversed(_divisors(self.config, self.machines))
        return next(
            (size for size in sizes if self.memory(_with_train(config, micro_batch=size), mode, size).total <= self.gpu_memory),
            0,
        )

    @property
    def gpu_memory(self) -> float:
        return self.machines.gpu.memory


def bucket(weights: Weights) -> int:
    """Elements of the buckets that ZeRO-3 gathers and reduces in: a block, so that each moves while another is at work."""
    return max(weights.block, weights.largest)


def search(config: Config, machines: Machines, fixed: Sequence[str]) -> Search:
    """Every engine, sharing, recomputation and micro batch but for what ``fixed`` (section.key) names, with compiled blocks
    where an engine can; the fewest seconds a step first, then what is computed again least, then compiled blocks, then DDP
    before ZeRO-3 before FSDP2, then the larger micro batch.

    Raises ConfigError where the global batch does not divide.
    """
    train = config.train
    if train.global_batch % machines.gpus:
        unit = math.lcm(machines.gpus, config.data.lanes)
        below = train.global_batch // unit * unit
        raise ConfigError(
            f"train.global_batch {train.global_batch} is not divisible by {machines.gpus} GPUs: "
            f"{machines.gpus} x {train.global_batch // machines.gpus} + {train.global_batch % machines.gpus}; "
            f"with data.lanes {config.data.lanes} the nearest {f'are {below} and' if below else 'is'} {below + unit}"
        )
    if "train.engine" in fixed and train.engine == "single" and machines.gpus > 1:
        raise ConfigError(f"train.engine single is one process, not {machines.gpus}")
    if "train.engine" in fixed and train.engine == "deepspeed" and MODES[train.precision].scaled:
        raise ConfigError(
            f"train.precision {train.precision} needs a loss scale, which ZeRO has not; use ddp, fsdp2 or leave it out"
        )
    if "train.engine" in fixed and train.engine == "deepspeed" and train.shard_ranks == 1 != machines.gpus:
        raise ConfigError("train.shard_ranks 1 is whole weights on each rank, which ZeRO-3 does not have; use ddp without it")
    weights = weights_of(config.model)
    candidates = []
    for each in _configs(config, machines, fixed):
        collectives = step_collectives(each, weights, machines)
        candidates.append(Candidate(each, collectives, step_time(each, weights, machines, collectives)))
    return Search(config, machines, frozenset(fixed), weights, pass_estimator(), sorted(candidates, key=_sort_key))


def _sort_key(candidate: Candidate) -> tuple[int, int, bool, int, int]:
    train = candidate.config.train
    eager = not candidate.config.kernels.compile  # whose launches take longer than they are known to
    return (
        candidate.time_bucket,
        RECOMPUTE.index(train.recompute),
        eager,
        [*ENGINES].index(train.engine),
        -(train.micro_batch or 0),
    )


def _configs(config: Config, machines: Machines, fixed: Sequence[str]) -> Iterator[Config]:
    train = config.train
    several = ("ddp", "fsdp2") if MODES[train.precision].scaled else ("ddp", "deepspeed", "fsdp2")  # ZeRO-3 has no loss scale
    engines = ("single",) if machines.gpus == 1 else several
    nodes = machines.nodes > 1 and machines.per_node > 1 and machines.gpus % machines.per_node == 0
    shares = (None, machines.per_node) if nodes else (None,)
    for engine, share, recompute, micro in product(
        (train.engine,) if "train.engine" in fixed else engines,
        (train.shard_ranks,) if "train.shard_ranks" in fixed else shares,
        (train.recompute,) if "train.recompute" in fixed else RECOMPUTE,
        (train.micro_batch,) if "train.micro_batch" in fixed and train.micro_batch else _divisors(config, machines),
    ):
        zero3 = engine == "deepspeed"
        if zero3 and share == 1 != machines.gpus:
            continue  # whole weights on each rank, which ZeRO-3 does not have
        if engine == "ddp" and share:
            continue
        compiled = config.kernels.compile if "kernels.compile" in fixed else not zero3  # quicker wherever it was measured
        if zero3 and compiled:
            continue  # which training refuses
        kernels = dataclasses.replace(config.kernels, compile=compiled)
        chosen = _with_train(config, engine=engine, shard_ranks=share, recompute=recompute, micro_batch=micro)
        yield dataclasses.replace(chosen, kernels=kernels)


def _divisors(config: Config, machines: Machines) -> list[int]:
    of_rank = config.train.global_batch // machines.gpus
    return [size for size in range(1, of_rank + 1) if of_rank % size == 0]


def _with_train(config: Config, **train: object) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))  # type: ignore[arg-type]


def _nothing_fits(found: Search) -> str:
    need, config = min(
        ((found.need(candidate.config)[0], candidate.config) for candidate in found.candidates), key=lambda pair: pair[0]
    )
    held = ", ".join(sorted(found.fixed & {"train.engine", "train.shard_ranks", "train.recompute", "train.micro_batch"}))
    instead = f"leave {held} to the search" if held else "take more GPUs, or GPUs with more memory"
    train = config.train
    return (
        f"nothing fits {found.gpu_memory / 1e9:.0f} GB a GPU on {found.machines.gpus}: "
        f"the smallest need is {need / 1e9:.0f} GB "
        f"({train.engine}, recompute {train.recompute}, micro_batch {train.micro_batch}); {instead}"
    )


assert set(RECOMPUTE) == set(get_args(Recompute))
