"""Rank 0 of many that are not there."""

import os

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore


def join_fake_group(ranks: int) -> None:
    """A process group that sends nothing: what is built and kept is what would be among the others."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
