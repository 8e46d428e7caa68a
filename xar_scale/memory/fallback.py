"""How many parts a micro-batch must be split into to fit after the guard's fallback to TF32."""

import os
from collections.abc import Callable

import torch

from xar_scale import dist
from xar_scale.config import Config, micro_batches
from xar_scale.memory.passes import PassEstimator, pass_estimator, pass_memory
from xar_scale.memory.rank import rank_memory
from xar_scale.precision import MODES


def plan_fallback(
    config: Config,
    world: int,
    device: torch.device,
    room: float,
    estimate_pass: PassEstimator = pass_memory,
    bucket: int | None = None,
) -> tuple[int, str]:
    """Return (parts per micro-batch after the fallback, a warning or ""): the fewest equal parts that fit in ``room`` bytes.

    There is no warning if the unsplit micro-batch fits, or if it does not fit in the run's own precision either.
    """
    fallback = MODES[config.train.precision].fallback
    if fallback is None or not config.guard.enabled:
        return 1, ""
    samples = micro_batches(config.train, world)[0]

    def need(mode: str, samples: int) -> float:
        return rank_memory(config, mode, samples, world, device, estimate_pass, bucket).total

    most = need(fallback, samples)
    if most <= room:
        return 1, ""
    divisors = (parts for parts in range(2, samples) if samples % parts == 0)
    parts = next((parts for parts in divisors if need(fallback, samples // parts) <= room), samples)
    if need(config.train.precision, samples) > room:
        return parts, ""
    needs = f"after a fallback {fallback.upper()} needs about {_gb(most)} of {_gb(room)}"
    least = need(fallback, 1)
    if least > room:
        return samples, f"{needs}, and {_gb(least)} even for one sample: it may run out of memory"
    return parts, f"{needs}: each micro-batch will run in {parts} parts (micro_batch {samples} as {parts} x {samples // parts})"


def _gb(size: float) -> str:
    return f"{size / 1e9:.{0 if size >= 10e9 else 1}f} GB"


def device_memory(device: torch.device) -> int:
    """Bytes available to this rank: its GPU's memory, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // dist.local_world()


def fallback_splits(config: Config, device: torch.device) -> int:
    """Return the parts per micro-batch after the fallback, for the rank with the least memory. Collective: every rank gets the
    same number. Rank 0 prints the warning, if any."""
    room = min(dist.gather_objects(device_memory(device)))
    splits, warning = dist.on_rank_0(
        lambda: _or_whole(lambda: plan_fallback(config, dist.world(), device, room, pass_estimator()))
    )
    if warning:
        dist.say(f"memory: {warning}")
    return splits


def _or_whole(plan: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """Return the plan, or (1, a warning) if it fails: fake tensors rely on PyTorch internals, which must not end a run."""
    try:
        return plan()
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return (
            1,
            f"cannot estimate the memory after a fallback ({why}); it will not split micro-batches, and may run out of memory",
        )
