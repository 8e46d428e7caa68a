"""Copies in pinned host memory: of the size that is copied, and only while it is used."""

import gc
import re
from pathlib import Path

import torch

from xar_scale.staging import Staging


def flags_of(address):
    """Return the kernel's flags of the mapping at an address."""
    there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            there = int(match[1], 16) <= address < int(match[2], 16)
        elif there and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(address)


def test_a_gpu_copies_into_pinned_memory_which_is_released(device):
    sizes = [2**20 + 1, 0, 3]
    for _ in range(3):  # memory that was not released could not be pinned again
        tensors = [torch.randn(size, device=device) for size in sizes]
        staging = Staging(tensors)
        assert all(copy.is_pinned() for copy in staging.copies if copy.numel())
        assert "dc" in flags_of(staging.copies[0].data_ptr())  # no fork, as data workers are, gets a copy
        staging.take(tensors)
        kept = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()  # the GPU copies before
        staging.wait()
        assert all(torch.equal(copy, tensor.cpu()) for copy, tensor in zip(staging.copies, kept, strict=True))
        copy = staging.copies[0]
        del staging
        gc.collect()
        assert not copy.is_pinned()
