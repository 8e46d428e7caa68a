"""Memory of this process."""

import os
from pathlib import Path


def resident() -> int:
    """Resident bytes of the process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident(reset: bool = False) -> int:
    """Peak resident bytes since the last ``reset``, which sets the peak to the current value."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
