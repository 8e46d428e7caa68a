"""A run's metrics: TensorBoard, one JSON line per logged step, and a progress bar or plain lines. Rank 0 only."""

import contextlib
import errno
import itertools
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from typing_extensions import Self

from xar_scale.dist import file_error
from xar_scale.files import parse_json
from xar_scale.validation import MAX_COUNT

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class Metrics:
    """A context manager. ``start``: the step that a resumed run resumes from; entries logged after it are dropped.

    If the disk is full, entries are buffered, with one message, and written together with later ones.
    """

    def __init__(self, run: Path, start: int, steps: int) -> None:
        self.run, self.steps = run, steps
        self._written = start  # the last step on disk
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._files: tuple[_File, _Events] | None = None
        self._failing = False
        self._open()
        console = Console(file=sys.stdout)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[summary]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=steps, completed=start, summary="")

    def _open(self) -> tuple["_File", "_Events"]:
        if self._files is None:
            path = self.run / METRICS_FILE
            self._files = _File(path, _end_of(path, self._written)), _Events(self.run / TENSORBOARD_FOLDER, self._written)
        return self._files

    def _close(self) -> None:
        files, self._files = self._files, None
        for file in files or ():
            with contextlib.suppress(OSError):  # what was not written stays in the buffer
                file.close()

    def _write(self) -> None:
        """Write the buffered entries, as far as the disk takes them."""
        try:
            lines, events = self._open()
            while self._pending:
                step, values = self._pending[0]
                events.add(step, {f"train/{name}": value for name, value in values.items() if isinstance(value, int | float)})
                lines.write(json.dumps({"step": step, **values}).encode() + b"\n")
                self._written = step
                self._pending.pop(0)
        except OSError as error:
            self._close()  # reopened at the end of the last complete entry
            if not self._failing:
                print(f"metrics cannot be written, buffering them: {file_error(error)}", flush=True)
            self._failing = True
            return
        if self._failing:
            print("metrics are written again", flush=True)
        self._failing = False

    def show(self, step: int, images: dict[str, bytes], metrics: dict[str, float]) -> None:
        """Write PNGs and evaluation metrics to TensorBoard, by name. If the disk is full, they are dropped with a message."""
        try:
            self._open()[1].add(step, {f"evaluate/{name}": value for name, value in metrics.items()}, images)
        except OSError as error:
            self._close()  # later entries go to a new file: the last record of this one may be cut off
            print(f"samples and metrics of step {step} are not written to TensorBoard: {file_error(error)}", flush=True)

    def go_back(self, step: int) -> None:
        """The run continues from ``step``: drop entries logged after it."""
        self._close()
        self._written = min(self._written, step)
        self._pending = [entry for entry in self._pending if entry[0] <= step]
        with contextlib.suppress(OSError):  # the next write meets the error again
            self._open()
        self.advance(step)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        self._write()
        self._close()
        if self._pending:
            print(f"metrics of the last {len(self._pending)} logged steps are lost", flush=True)

    def advance(self, step: int) -> None:
        """Set the progress bar to ``step`` steps done."""
        self.progress.update(self.task, completed=step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log ``values`` after ``step`` steps, and show the main ones on the progress bar or as a line."""
        self._pending.append((step, values))
        self._write()
        summary = f"loss {values['loss']:.4f}  {values['images_per_s']:.0f} images/s"
        self.progress.update(self.task, summary=summary)
        if self.progress.disable:
            left = (self.steps - step) * values["step_s"]
            print(
                f"step {step}/{self.steps}  {summary}  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.3f}  "
                f"data wait {values['data_wait_s']:.3f} s/step  ETA {left:.0f} s",
                flush=True,
            )


class _File:
    """An unbuffered file to append to. A write that is not complete raises OSError."""

    def __init__(self, path: Path, size: int) -> None:
        """``size``: bytes of the existing content to keep."""
        self.file = path.open("ab", buffering=0)
        self.file.truncate(size)

    def write(self, content: bytes) -> None:
        if self.file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.file.close()


class _Events:
    """A TensorBoard event file. PyTorch's writer uses a thread, whose errors cannot be handled.

    ``start``: TensorBoard ignores entries after this step in earlier files.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}"  # read in this order
        self.file = _File(path, 0)
        self.records = RecordWriter(self.file)
        try:
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
                self.close()
            raise

    def add(self, step: int, scalars: dict[str, float], images: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Append one event with scalars and ``images``, PNGs by tag."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        values += [Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=png)) for tag, png in images.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())

    def close(self) -> None:
        self.file.close()


def memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB: allocated on the GPU, or, without one, resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the log of ``run``, a dictionary per line. A line that a crash or a full disk cut off is left out."""
    return [values for _, values in _whole_lines((run / METRICS_FILE).read_bytes())]


def _whole_lines(content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield for each readable line of a log its end, in bytes, and its values."""
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            values = parse_json(line)
            readable = line.endswith(b"\n") and type(values["step"]) is int and 0 < values["step"] < MAX_COUNT
        except (ValueError, KeyError, TypeError):
            continue
        if readable:
            yield end, values


def _end_of(path: Path, step: int) -> int:
    """Return the end, in bytes, of a log's last complete line up to ``step``."""
    if not path.exists():
        return 0
    lines = _whole_lines(path.read_bytes())
    return max((end for end, _ in itertools.takewhile(lambda line: line[1]["step"] <= step, lines)), default=0)
