"""Process many files in helper processes."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from xar_scale.errors import ProcessError

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yield ``work(item)`` for each item, in order. Raises what it raises, and ProcessError if a process dies."""
    try:
        with ProcessPoolExecutor(processes, initializer=initializer, initargs=initargs) as pool:
            yield from pool.map(work, items)
    except BrokenProcessPool:
        raise ProcessError(f"one of {processes} helper processes died: killed, or out of memory (see --processes)") from None
