"""The candidate configurations for a model on given GPUs, and the cheapest that fits."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import get_args

import torch

from xar_scale.config import Config, EngineName, Recompute, micro_batches, shard_ranks
from xar_scale.errors import ConfigError
from xar_scale.memory.fallback import plan_fallback
from xar_scale.memory.passes import PassEstimator, pass_estimator
from xar_scale.memory.rank import RankMemory, Weights, rank_memory, weights_of
from xar_scale.plan.cost import Collective, StepTime, step_collectives, step_time
from xar_scale.plan.hardware import Machines
from xar_scale.precision import MODES

CUDA = torch.device("cuda", 0)
TIME_TOLERANCE = 0.02  # relative; estimated step times that differ by less are equal
ENGINES = {"single": "single", "ddp": "DDP", "deepspeed": "ZeRO-3", "fsdp2": "FSDP2"}  # in order of preference among equals
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full", "offload")  # least work first


@dataclass(frozen=True)
class Candidate:
    """A candidate configuration and its estimated step time."""

    config: Config
    collectives: list[Collective]
    time: StepTime

    @property
    def name(self) -> str:
        train = self.config.train
        group = f" in sharding groups of {train.shard_ranks}" if train.shard_ranks else ""
        compiled = ", compiled" if self.config.kernels.compile else ""
        return f"{ENGINES[train.engine]}{group}{compiled}, recompute {train.recompute}, micro-batch {train.micro_batch}"

    @property
    def time_bucket(self) -> int:
        """Logarithm of the step time in units of TIME_TOLERANCE: equal for times that the estimate cannot tell apart."""
        return round(math.log(self.time.total, 1 + TIME_TOLERANCE))


@dataclass(frozen=True)
class FeasibleCandidate(Candidate):
    """A candidate that fits. ``parts``: how many parts the guard splits a micro-batch into after a fallback to TF32."""

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
        """The best candidate that fits. Raises ConfigError if none does."""
        best = next(self.feasible(), None)
        if best is None:
            raise ConfigError(_nothing_fits(self))
        return best

    def feasible(self) -> Iterator[FeasibleCandidate]:
        """Yield the candidates that fit, the best first. Memory is estimated lazily, one candidate at a time."""
        for candidate in self.candidates:
            need, memory, parts = self.need(candidate.config)
            if need <= self.gpu_memory:
                yield FeasibleCandidate(candidate.config, candidate.collectives, candidate.time, memory, parts)

    def need(self, config: Config) -> tuple[float, RankMemory, int]:
        """Return (bytes a GPU must have, the memory by part in the run's precision, parts per micro-batch after a fallback)."""
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
        """Return the largest micro-batch that divides a rank's share of the global batch and fits in ``mode``, or 0."""
        sizes = reversed(_divisors(self.config, self.machines))
        return next(
            (size for size in sizes if self.memory(_with_train(config, micro_batch=size), mode, size).total <= self.gpu_memory),
            0,
        )

    @property
    def gpu_memory(self) -> float:
        return self.machines.gpu.memory


def bucket(weights: Weights) -> int:
    """Elements of ZeRO-3's gather and reduce buckets: one block, so that one is sent while another computes."""
    return max(weights.block, weights.largest)


def search(config: Config, machines: Machines, fixed: Sequence[str]) -> Search:
    """Return all candidates: every engine, sharding group, mode of recomputation and micro-batch, except for the ``fixed`` keys
    (section.key), which keep their values. Blocks are compiled where the engine allows it.

    They are sorted by step time, then least recomputation, then compiled blocks, then engine (DDP, ZeRO-3, FSDP2), then the
    largest micro-batch. Raises ConfigError if the GPUs do not divide the global batch, or fixed keys contradict each other.
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
    weights = weights_of(config.model)
    candidates = []
    for each in _configs(config, machines, fixed):
        collectives = step_collectives(each, weights, machines)
        candidates.append(Candidate(each, collectives, step_time(each, weights, machines, collectives)))
    return Search(config, machines, frozenset(fixed), weights, pass_estimator(), sorted(candidates, key=_sort_key))


def _sort_key(candidate: Candidate) -> tuple[int, int, bool, int, int]:
    train = candidate.config.train
    eager = not candidate.config.kernels.compile  # its launches take longer than the estimate
    return (
        candidate.time_bucket,
        RECOMPUTE.index(train.recompute),
        eager,
        [*ENGINES].index(train.engine),
        -(train.micro_batch or 0),
    )


def _configs(config: Config, machines: Machines, fixed: Sequence[str]) -> list[Config]:
    """Return the configs that training accepts. Raises its ConfigError if there are none."""
    train, found, refusals = config.train, list[Config](), list[ConfigError]()
    engines: tuple[EngineName, ...] = ("single",) if machines.gpus == 1 else ("ddp", "deepspeed", "fsdp2")
    nodes = machines.nodes > 1 and machines.per_node > 1 and machines.gpus % machines.per_node == 0
    groups = (None, machines.per_node) if nodes else (None,)
    for engine, group, recompute, micro in product(
        (train.engine,) if "train.engine" in fixed else engines,
        (train.shard_ranks,) if "train.shard_ranks" in fixed else groups,
        (train.recompute,) if "train.recompute" in fixed else RECOMPUTE,
        (train.micro_batch,) if "train.micro_batch" in fixed and train.micro_batch else _divisors(config, machines),
    ):
        # faster wherever it was measured
        compiled = config.kernels.compile if "kernels.compile" in fixed else engine != "deepspeed"
        kernels = dataclasses.replace(config.kernels, compile=compiled)
        try:
            chosen = dataclasses.replace(train, engine=engine, shard_ranks=group, recompute=recompute, micro_batch=micro)
            shard_ranks(chosen, machines.gpus)
            found.append(dataclasses.replace(config, train=chosen, kernels=kernels))
        except ConfigError as refused:
            refusals.append(refused)
    if not found:
        raise refusals[0]
    return found


def _divisors(config: Config, machines: Machines) -> list[int]:
    per_rank = config.train.global_batch // machines.gpus
    return [size for size in range(1, per_rank + 1) if per_rank % size == 0]


def _with_train(config: Config, **train: object) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))  # type: ignore[arg-type]


def _nothing_fits(found: Search) -> str:
    need, config = min(
        ((found.need(candidate.config)[0], candidate.config) for candidate in found.candidates), key=lambda pair: pair[0]
    )
    held = ", ".join(sorted(found.fixed & {"train.engine", "train.shard_ranks", "train.recompute", "train.micro_batch"}))
    instead = f"leave {held} to the search" if held else "use more GPUs, or GPUs with more memory"
    train = config.train
    return (
        f"no candidate fits in {found.gpu_memory / 1e9:.0f} GB per GPU on {found.machines.gpus} GPUs: "
        f"the smallest needs {need / 1e9:.0f} GB "
        f"({train.engine}, recompute {train.recompute}, micro_batch {train.micro_batch}); {instead}"
    )


assert set(RECOMPUTE) == set(get_args(Recompute))
