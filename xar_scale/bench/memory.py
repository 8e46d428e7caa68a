"""Memory of this process."""

import os
from pathlib import Path

import torch


def resident() -> int:
    """Resident bytes of the process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident(reset: bool = False) -> int:
    """Peak resident bytes since the last ``reset``, which sets the peak to the current value."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_memory(device: torch.device, reset: bool = False) -> int:
    """Peak bytes since the last ``reset``, which sets the peak to the current value: allocated by PyTorch on a GPU, resident
    in this process otherwise."""
    if device.type != "cuda":
        return peak_resident(reset)
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)
