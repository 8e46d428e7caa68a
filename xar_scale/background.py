"""Work that all ranks do in threads while training goes on: begun, ended and tried again by all of them together."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from xar_scale import dist
from xar_scale.errors import FileError

POLL_S = 0.05  # between looks at whether all ranks are done
Stage = Callable[[Sequence[Any]], Any]  # from all ranks' results of the stage before to this one's


class Background:
    """Stages of ``name``, one after another; a stage begins when the one before it is done on all ranks.

    A FileError on any rank is said, and the stage tried again by all. Every rank makes the same calls in the same order.
    """

    def __init__(self, name: str, stages: Sequence[Stage], device: torch.device) -> None:
        self.name, self.stages, self.device = name, list(stages), device
        self.attempts, self.error = 0, ""  # of this stage, that failed; how the last one did
        self._begun = time.perf_counter()
        self._results: Sequence[Any] = ()
        self._polls = 0  # until the next attempt
        self._running: Future[Any] | None = None
        self._thread: threading.Thread | None = None
        self._start()

    @property
    def done(self) -> bool:
        return not self.stages

    @property
    def failing(self) -> bool:
        """Waiting for another attempt."""
        return self._running is None and self.attempts > 0

    def poll(self) -> None:
        """Between steps: where every rank's thread is done, go on together."""
        if self.done:
            return
        if self._running is None:
            self._polls -= 1
            if self._polls <= 0:
                self._start()
        elif not self._under_way():
            self._conclude()

    def settle(self, attempts: int) -> bool:
        """Wait until all is done; False where a stage has failed ``attempts`` times from now on, 1, 2, 4, ... seconds apart."""
        before = self.attempts - self.failing  # what already failed counts as the first
        while not self.done:
            if self._running is None:
                if (failed := self.attempts - before) >= attempts:
                    return False
                time.sleep(2.0 ** (failed - 1))
                self._start()
            while self._under_way():  # in turns: one long wait in a collective would be taken for a hang
                assert self._thread is not None
                self._thread.join(POLL_S)
            self._conclude()
            before = min(before, self.attempts)  # a stage that is done leaves no failures to the next
        return True

    def _under_way(self) -> bool:
        """Whether some rank's thread is still at work."""
        assert self._running is not None
        return bool(dist.all_reduce_sum(torch.tensor(int(not self._running.done()), device=self.device)))

    def _start(self) -> None:
        """This rank's part of the stage, in a thread that does not keep the process from ending."""
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
        """Learn what the stage came to on all ranks, which are done with it."""
        running, self._running = self._running, None
        assert running is not None and self._thread is not None
        self._thread.join()  # all of it: a thread that is still there when the interpreter goes takes the process down with it
        try:
            self._results = dist.gather_objects(dist.together(running.result))
        except FileError as error:
            self.attempts, self.error = self.attempts + 1, str(error)
            self._polls = 2**self.attempts
            dist.say(f"{self.name}: attempt {self.attempts} failed: {error}")
            return
        self.attempts = 0
        self.stages.pop(0)
        if self.stages:
            self._start()
        else:
            dist.say(f"{self.name}: done in {time.perf_counter() - self._begun:.1f} s")
