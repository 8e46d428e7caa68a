"""What asks a run to stop before its end: signals, a time limit, a file. One rank hears it, all leave at the same step."""

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
POLL_S = 1.0  # between looks at the file
AGAIN_S = 2.0  # after which a second Ctrl-C is one, and not the same that a launcher passes on


class StopRequests:
    """Wishes of this rank. ``after``: seconds from now, for the run to stop in; none: no limit."""

    def __init__(self, run: Path, after: float | None = None) -> None:
        self.file = run / STOP_FILE
        self.after, self.begun = after, time.monotonic()
        self.signals: dict[str, float] = {}  # signals by name, and when
        self._terminal = [output for output in (1, 2) if os.isatty(output)]
        self._polled = -POLL_S
        self._file_found = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In the context SIGUSR2, SIGTERM, SIGINT and SIGHUP are wishes, but for a second SIGINT, and a SIGHUP that is ignored,
        as nohup has it. In the main thread."""
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
        if number == signal.SIGHUP:  # the terminal has gone, and what is written to it is an error
            for output in self._terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        self.signals.setdefault(name, now)

    def requested(self) -> bool:
        """Whether this rank has been. Rank 0 looks at the clock and, once in a while, for the file."""
        if dist.rank() == 0 and time.monotonic() - self._polled >= POLL_S:
            self._polled, self._file_found = time.monotonic(), self._file_found or os.path.exists(self.file)
        return bool(self.signals) or self._file_found or self._late()

    def _late(self) -> bool:
        return dist.rank() == 0 and self.after is not None and time.monotonic() - self.begun >= self.after

    def error(self, when: str) -> XarScaleError:
        """Why all ranks leave: PreemptedError where one of them was sent SIGUSR2, else StoppedError. Every rank calls this."""
        wishes = list(self.signals)
        if dist.rank() == 0:
            wishes += [f"{self.file} is there"] if self._file_found else []
            wishes += [f"--stop-after {self.after:g} s are over"] if self._late() else []
        found = [(rank, wish) for rank, of_rank in enumerate(dist.gather_objects(wishes)) for wish in of_rank]
        preempted = [(rank, wish) for rank, wish in found if wish == "SIGUSR2"]
        rank, wish = (preempted or found)[0]
        said = f"{wish} to rank {rank}" if wish.startswith("SIG") else wish
        kind = PreemptedError if preempted else StoppedError
        return kind(f"{when} ({said}): a checkpoint is written, the same command goes on")

    def local_error(self, when: str) -> XarScaleError:
        """The same of this rank's wishes, before there is anything to agree on or to write."""
        return (PreemptedError if "SIGUSR2" in self.signals else StoppedError)(when)

    def remove_file(self) -> None:
        """The file would stop the next start too."""
        if dist.rank() == 0:
            with contextlib.suppress(OSError):
                self.file.unlink()
