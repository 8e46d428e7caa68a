"""Copies of an engine's tensors in the host's memory, which is taken once and used again."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Staging:
    """Host memory for copies of ``tensors``, pinned where they are on a GPU."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.copies = [_host_memory(tensor) for tensor in tensors]
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy ``tensors`` as they are now. A GPU copies when it comes to it: before whatever it is asked to do next, and so
        without anybody waiting for it.
        """
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        for device in devices:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until the copies are there; for whoever reads them on the host."""
        if self._copied is not None:
            with torch.cuda.device(self._copied.device):  # another thread would otherwise begin to use the first GPU
                self._copied.synchronize()


def _host_memory(tensor: Tensor) -> Tensor:
    """Written to: memory that nobody has is found out now."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda).fill_(0)
