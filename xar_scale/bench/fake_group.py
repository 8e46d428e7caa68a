"""A fake process group: rank 0 of many ranks that do not exist."""

import os

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore


def join_fake_group(ranks: int) -> None:
    """Join a group of ``ranks`` whose collectives send nothing. This rank builds and keeps what it would in a real group."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
