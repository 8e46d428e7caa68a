"""Staging buffers: copies of an engine's tensors in host memory, allocated once and reused."""

import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64  # bytes: each copy starts at a multiple of it


class Staging:
    """Host memory for copies of ``tensors``, pinned if they are on a GPU."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        pinned = size > 0 and any(tensor.is_cuda for tensor in tensors)
        # filled with zeros, so that missing memory shows now
        memory = self._pinned(size) if pinned else torch.empty(size, dtype=torch.uint8).fill_(0)
        self.copies = [
            memory[start:][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=True)
        ]
        self._copied: torch.cuda.Event | None = None

    def _pinned(self, size: int) -> Tensor:
        """Allocate pinned memory that lives as long as this object. PyTorch's own is rounded up to powers of two, up to twice
        the size."""
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTFORK)  # data workers are forks: the system would copy pinned pages for them
        memory, runtime = torch.frombuffer(pages, dtype=torch.uint8).fill_(0), torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
        return memory

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy ``tensors`` as they are now. On a GPU the copy is asynchronous and in stream order: it precedes later work on
        the stream, and nothing waits for it.
        """
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        for device in devices:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait for the copies to arrive, before reading them on the host."""
        if self._copied is not None:
            with torch.cuda.device(self._copied.device):  # else another thread would open a context on GPU 0
                self._copied.synchronize()
