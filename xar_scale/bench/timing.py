"""Timing of work on a device."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

WARM_UP, REPEATS = 2, 5


def median_ms(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median of REPEATS runs after WARM_UP runs."""
    return 1e3 * statistics.median(in_turns({"work": work}, device)["work"])


def in_turns(works: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int = REPEATS) -> dict[str, list[float]]:
    """Return the seconds of each work, ``repeats`` times after WARM_UP runs. The works take turns, so that a temporary slowdown
    of the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(WARM_UP + repeats):
        for name, work in works.items():
            _synchronize(device)
            begun = time.perf_counter()
            work()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - begun)
    return {name: taken[WARM_UP:] for name, taken in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
