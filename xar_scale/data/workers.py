"""PyTorch's data loader, and what becomes of it when one of its worker processes dies."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from xar_scale import dist


class DeadWorkerError(Exception):
    """A worker is gone: killed, or out of memory. Others may be as they were, but the loader is of no more use."""


class _Flag:
    """An event without a lock. A worker that is killed while it holds a lock holds it for ever, and PyTorch's asks for it."""

    def __init__(self, context: BaseContext) -> None:
        self._value = context.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


def _context() -> BaseContext:
    """The system's way to start processes, with such events."""
    usual = type(multiprocessing.get_context(multiprocessing.get_start_method()))
    return type("Context", (usual,), {"Event": lambda self: _Flag(self)})()


def from_workers(dataset: Dataset[Any], workers: int, **settings: Any) -> Iterator[Any]:
    """What ``DataLoader(dataset, num_workers=workers, **settings)`` yields. Raises DeadWorkerError, or what a worker raises."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=workers,
        multiprocessing_context=_context() if workers else None,
        worker_init_fn=partial(_init_worker, os.getpid()),
        generator=torch.Generator(),  # or it would draw from the one that dropout draws from
        **settings,
    )
    with _without_sigchld_handler():
        stream = iter(loader)
    for worker in getattr(stream, "_workers", ()):  # which take no notice of SIGTERM; torch 2.11 to 2.15
        worker._popen.terminate = worker._popen.kill
    while True:
        try:
            item = next(stream)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not (workers and is_worker_death(error)):
                raise
            said = str(error).splitlines()[0] if str(error) else "while it handed over a batch"
            raise DeadWorkerError(f"a data worker died: {said.strip()}") from None
        yield item


def is_worker_death(error: Exception) -> bool:
    """Whether a worker is gone: PyTorch says so, or what it left in the queue cannot be fetched from it any more.

    What a living worker raises comes as "Caught ... in DataLoader worker process".
    """
    said = str(error)
    if isinstance(error, RuntimeError):
        return said.startswith("DataLoader worker (pid")
    return not said.startswith("Caught ") or "in pin memory thread" in said.splitlines()[0]  # which fetches on CUDA


@contextlib.contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """PyTorch reports a worker's death by raising from a signal handler, in the middle of whatever the process does then.

    Without that handler it is found by whoever waits for the next batch.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").startswith("torch."):  # of another loader, made without this
        handler = signal.SIG_DFL
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)


def _init_worker(parent: int, worker: int) -> None:
    """A process that is killed must not leave workers behind: they would wait for it with their memory.

    Until then signals are its affair: SLURM and terminals send them to all processes alike, and its last steps need data.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    dist.follow_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)
