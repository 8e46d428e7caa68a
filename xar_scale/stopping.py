"""Requests to stop a run early: signals, a time limit, a file. If any rank sees one, all ranks exit after the same step."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from xar_scale import dist
from xar_scale.errors import PreemptedError, StoppedError, XarScaleError

STOP_FILE = "STOP"
POLL_S = 1.0  # between checks for the file
AGAIN_S = 2.0  # a SIGINT within this time is the same Ctrl-C, forwarded by a launcher; a later one is a second Ctrl-C


class StopRequests:
    """The stop requests that this rank has seen. ``after``: time limit in seconds from now; None: no limit."""

    def __init__(self, run: Path, after: float | None = None) -> None:
        self.file = run / STOP_FILE
        self.after, self.begun = after, time.monotonic()
        self.signals: dict[str, float] = {}  # arrival time by signal name
        self._terminal = [output for output in (1, 2) if os.isatty(output)]
        self._polled = -POLL_S
        self._file_found = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While the context is open, SIGUSR2, SIGTERM, SIGINT and SIGHUP request a stop. Exceptions: a second SIGINT ends the
        process, and a SIGHUP that is ignored (nohup) stays ignored. Main thread only."""
        heard = [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGINT and now - self.signals.get(name, now) > AGAIN_S:
            os._exit(128 + number)
        if number == signal.SIGHUP:  # the terminal is closed, and writing to it would fail
            for output in self._terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        self.signals.setdefault(name, now)

    def requested(self) -> bool:
        """Whether this rank has seen a stop request. Rank 0 also checks the clock and, every POLL_S seconds, the file."""
        if dist.rank() == 0 and time.monotonic() - self._polled >= POLL_S:
            self._polled, self._file_found = time.monotonic(), self._file_found or os.path.exists(self.file)
        return bool(self.signals) or self._file_found or self._late()

    def _late(self) -> bool:
        return dist.rank() == 0 and self.after is not None and time.monotonic() - self.begun >= self.after

    def error(self, when: str, *, saved: bool = True) -> XarScaleError:
        """Return why all ranks exit: PreemptedError if any rank received SIGUSR2, else StoppedError. Every rank calls this.

        ``saved``: whether there is a checkpoint of the last step.
        """
        requests = list(self.signals)
        if dist.rank() == 0:
            requests += [f"{self.file} exists"] if self._file_found else []
            requests += [f"--stop-after {self.after:g} s has passed"] if self._late() else []
        found = [(rank, request) for rank, of_rank in enumerate(dist.gather_objects(requests)) for request in of_rank]
        preempted = [(rank, request) for rank, request in found if request == "SIGUSR2"]
        rank, request = (preempted or found)[0]
        reason = f"{request} to rank {rank}" if request.startswith("SIG") else request
        kind = PreemptedError if preempted else StoppedError
        then = "a checkpoint is written, the same command resumes from it" if saved else "no checkpoint of it is written"
        return kind(f"{when} ({reason}): {then}")

    def local_error(self, when: str) -> XarScaleError:
        """The same for this rank's requests alone, where there is nothing to agree on or to write yet."""
        return (PreemptedError if "SIGUSR2" in self.signals else StoppedError)(when)

    def remove_file(self) -> None:
        """Remove the stop file, which would stop the next start too."""
        if dist.rank() == 0:
            with contextlib.suppress(OSError):
                self.file.unlink()
