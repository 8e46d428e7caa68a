"""Time of some work on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP, REPEATS = 2, 5


def median_ms(work: Callable[[], Any], device: torch.device) -> float:
    """Of several times, after some that do not count."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        _synchronize(device)
        begun = time.perf_counter()
        work()
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times[WARM_UP:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
