"""Memory of this process."""

import os
from pathlib import Path


def resident() -> int:
    """Bytes of memory that the process holds at this moment."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
