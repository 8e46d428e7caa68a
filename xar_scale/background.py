"""Work that all ranks do in threads while training continues; all ranks start, finish and retry it together."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from xar_scale import dist
from xar_scale.errors import FileError

POLL_S = 0.05  # between checks whether all ranks are done
Stage = Callable[[Sequence[Any]], Any]  # takes all ranks' results of the previous stage, returns this rank's result


class Background:
    """The stages of ``name``, one after another: a stage starts when the one before it is done on all ranks.

    A FileError on any rank is printed, and the ranks that failed retry the stage; the others keep what they did. Every rank
    makes the same calls in the same order.
    """

    def __init__(self, name: str, stages: Sequence[Stage], device: torch.device) -> None:
        self.name, self.stages, self.device = name, list(stages), device
        self.attempts, self.error = 0, ""  # failed attempts at this stage; the last one's error
        self._begun = time.perf_counter()
        self._results: Sequence[Any] = ()
        self._polls = 0  # until the next attempt
        self._running: Future[Any] | None = None
        self._succeeded: Future[Any] | None = None  # this rank's part of the stage, which another rank has to retry
        self._thread: threading.Thread | None = None
        self._start()

    @property
    def done(self) -> bool:
        return not self.stages

    @property
    def failing(self) -> bool:
        """Whether a stage has failed and waits for its retry."""
        return self._running is None and self.attempts > 0

    def poll(self) -> None:
        """Between steps: if every rank's thread is done, finish the stage and start the next one together."""
        if self.done:
            return
        if self._running is None:
            self._polls -= 1
            if self._polls <= 0:
                self._start()
        elif not self._under_way():
            self._conclude()

    def settle(self, attempts: int, until: float | None = None) -> bool:
        """Wait until all is done. Returns False if a stage fails ``attempts`` times from now on, 1, 2, 4, ... seconds apart, or
        if it is not done when rank 0's ``time.monotonic`` reaches ``until``: its thread continues then."""
        before = self.attempts - self.failing  # a failure whose retry is pending counts as the first
        while not self.done:
            if self._running is None:
                if (failed := self.attempts - before) >= attempts:
                    return False
                time.sleep(2.0 ** (failed - 1))
                self._start()
            while self._under_way():  # poll: one long wait in a collective would look like a hang
                if until is not None and dist.gather_floats(time.monotonic() >= until)[0][0]:
                    return False
                assert self._thread is not None
                self._thread.join(POLL_S)
            self._conclude()
            before = min(before, self.attempts)  # a finished stage resets the failures
        return True

    def _under_way(self) -> bool:
        """Whether some rank's thread is still running."""
        assert self._running is not None
        return bool(dist.all_reduce_sum(torch.tensor(int(not self._running.done()), device=self.device)))

    def _start(self) -> None:
        """Start this rank's part of the stage, in a daemon thread, which does not keep the process alive."""
        if self._succeeded is not None:
            self._running = self._succeeded
            return
        self._running = running = Future[Any]()
        stage, results = self.stages[0], self._results

        def work() -> None:
            try:
                running.set_result(stage(results))
            except BaseException as error:
                running.set_exception(error)

        self._thread = threading.Thread(target=work, name=self.name, daemon=True)
        self._thread.start()

    def _conclude(self) -> None:
        """Collect the stage's results from all ranks, which are done with it."""
        running, self._running = self._running, None
        assert running is not None and self._thread is not None
        self._thread.join()  # to its end: a thread still alive when the interpreter shuts down crashes the process
        try:
            self._results = dist.gather_objects(dist.on_all_ranks(running.result))
        except FileError as error:
            self.attempts, self.error = self.attempts + 1, str(error)
            self._polls = 2**self.attempts
            self._succeeded = None if running.exception() else running
            dist.say(f"{self.name}: attempt {self.attempts} failed: {error}")
            return
        self.attempts, self._succeeded = 0, None
        self.stages.pop(0)
        if self.stages:
            self._start()
        else:
            dist.say(f"{self.name}: done in {time.perf_counter() - self._begun:.1f} s")
