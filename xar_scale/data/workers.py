"""PyTorch's data loader, with a defined error when one of its worker processes dies."""

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
    """A worker has died: killed, or out of memory. Others may still run, but the loader cannot be used any more."""


class _Flag:
    """An event without a lock. A worker that is killed while it holds a lock never releases it, and PyTorch's event has one."""

    def __init__(self, context: BaseContext) -> None:
        self._value = context.RawValue("b", 0)

    def set(self) -> None:
        self._value.value = 1

    def is_set(self) -> bool:
        return bool(self._value.value)


def _context() -> BaseContext:
    """Return the default multiprocessing context, with events of type _Flag."""
    usual = type(multiprocessing.get_context(multiprocessing.get_start_method()))
    return type("Context", (usual,), {"Event": lambda self: _Flag(self)})()


def from_workers(dataset: Dataset[Any], workers: int, *, late_s: float = 0.0, **settings: Any) -> Iterator[Any]:
    """Yield from ``DataLoader(dataset, num_workers=workers, **settings)``; if ``late_s`` is set, also None after every
    ``late_s`` seconds that the next item of the workers is waited for. Raises DeadWorkerError, or what a worker raises.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        num_workers=workers,
        timeout=late_s if workers else 0.0,
        multiprocessing_context=_context() if workers else None,
        worker_init_fn=partial(_init_worker, os.getpid()),
        generator=torch.Generator(),  # by default it would draw from the generator that dropout uses
        **settings,
    )
    with _without_sigchld_handler():
        stream = iter(loader)
    for worker in getattr(stream, "_workers", ()):  # they ignore SIGTERM; torch 2.11 to 2.15
        worker._popen.terminate = worker._popen.kill
    while True:
        try:
            item = next(stream)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            pinning = getattr(stream, "_pin_memory_thread", None)  # with a time limit PyTorch does not see that it has died
            if workers and is_late(error) and (pinning is None or pinning.is_alive()):
                yield None
                continue
            if not (workers and is_worker_death(error)):
                raise
            said = str(error).splitlines()[0] if str(error) else "while it handed over a batch"
            raise DeadWorkerError(f"a data worker died: {said.strip()}") from None
        yield item


def is_late(error: Exception) -> bool:
    """Return whether the loader's time limit for an item has passed. The item can still be waited for (torch 2.11 to 2.15)."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader timed out")


def is_worker_death(error: Exception) -> bool:
    """Return whether a worker has died: PyTorch reports it, or what the worker left in the queue can no longer be fetched.

    An exception of a living worker arrives as "Caught ... in DataLoader worker process".
    """
    said = str(error)
    if isinstance(error, RuntimeError):
        return said.startswith("DataLoader worker (pid")
    return not said.startswith("Caught ") or "in pin memory thread" in said.splitlines()[0]  # it fetches on CUDA


@contextlib.contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """Keep PyTorch's SIGCHLD handler uninstalled: it reports a worker's death by raising in the middle of any code.

    Without it, the death is found where the next batch is waited for.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").startswith("torch."):  # from a loader created without this
        handler = signal.SIG_DFL
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)


def _init_worker(parent: int, worker: int) -> None:
    """Make the worker end with its parent, even one that is killed: it would wait forever and keep its memory.

    Ignore signals until then: SLURM and terminals send them to all processes alike, and the parent's last steps need data.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not dist.die_with_parent(signal.SIGKILL, parent):
        os._exit(1)
