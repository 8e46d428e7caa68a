"""In how many parts a pass fits after the guard's fall back to TF32."""

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
    """(parts of a pass after the fallback, a warning or "") on devices of ``room`` bytes: as few equal parts as fit.

    There is no warning where a whole pass fits, nor where the run's own precision does not fit either.
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
    needs = f"{fallback.upper()} after a fallback needs about {_gb(most)} of {_gb(room)}"
    least = need(fallback, 1)
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
    splits, warning = dist.on_rank_0(
        lambda: _or_whole(lambda: plan_fallback(config, dist.world(), device, room, pass_estimator()))
    )
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
