"""Copies of an engine's tensors in the host's memory, which is taken once and used again."""

import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64  # bytes that each copy begins at a multiple of


class Staging:
    """Host memory for copies of ``tensors``, pinned where they are on a GPU."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        starts, size = [], 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        pinned = size > 0 and any(tensor.is_cuda for tensor in tensors)
        memory = self._pinned(size) if pinned else torch.empty(size, dtype=torch.uint8).fill_(0)  # what nobody has is known now
        self.copies = [
            memory[start:][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=True)
        ]
        self._copied: torch.cuda.Event | None = None

    def _pinned(self, size: int) -> Tensor:
        """For as long as this lives. PyTorch's own pinned memory is of powers of two, nearly twice what is asked for."""
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTFORK)  # data workers are forks, for which the system would copy what is pinned
        memory, runtime = torch.frombuffer(pages, dtype=torch.uint8).fill_(0), torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
        return memory

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
