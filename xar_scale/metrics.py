"""What a run says while it runs: TensorBoard, one JSON line a logging step, a progress bar or plain lines. Rank 0 only."""

import contextlib
import errno
import itertools
import json
import math
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

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class Metrics:
    """A context manager. ``start`` is the step a resumed run goes on from: what was logged after it is dropped.

    A disk that takes no more while the run goes on makes what is logged late: it is said once, kept, and written with what
    comes next.
    """

    def __init__(self, run: Path, start: int, steps: int) -> None:
        self.run, self.steps = run, steps
        self._written = start  # the last step on disk
        self._waiting: list[tuple[int, dict[str, Any]]] = []
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
            with contextlib.suppress(OSError):  # what it could not write is written again
                file.close()

    def _write(self) -> None:
        """All that waits, or as much of it as can be."""
        try:
            lines, events = self._open()
            while self._waiting:
                step, values = self._waiting[0]
                events.add(step, {f"train/{name}": value for name, value in values.items() if isinstance(value, int | float)})
                lines.write(json.dumps({"step": step, **values}).encode() + b"\n")
                self._written = step
                self._waiting.pop(0)
        except OSError as error:
            self._close()  # and opened anew, behind the last step that is there whole
            if not self._failing:
                print(f"metrics cannot be written, buffering them: {file_error(error)}", flush=True)
            self._failing = True
            return
        if self._failing:
            print("metrics are written again", flush=True)
        self._failing = False

    def show(self, step: int, pictures: dict[str, bytes], numbers: dict[str, float]) -> None:
        """In TensorBoard: PNGs by name, and numbers that are not training's. A disk that takes none does without."""
        try:
            self._open()[1].add(step, {f"evaluate/{name}": value for name, value in numbers.items()}, pictures)
        except OSError as error:
            self._close()  # what comes next begins a file of its own: in this one a record may be cut
            print(f"samples and metrics of step {step} are not written to TensorBoard: {file_error(error)}", flush=True)

    def go_back(self, step: int) -> None:
        """The run goes on from ``step``: drop what was logged after it."""
        self._close()
        self._written = min(self._written, step)
        self._waiting = [entry for entry in self._waiting if entry[0] <= step]
        with contextlib.suppress(OSError):  # it will be met again
            self._open()
        self.advance(step)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        self._write()
        self._close()
        if self._waiting:
            print(f"metrics of the last {len(self._waiting)} logged steps are lost", flush=True)

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        self.progress.update(self.task, completed=step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record ``values`` after ``step`` steps, and say the ones that matter."""
        self._waiting.append((step, values))
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
    """Something to append to, at once: what is not taken whole is an OSError."""

    def __init__(self, path: Path, size: int) -> None:
        """``size``: of what is there, how many bytes stay."""
        self.file = path.open("ab", buffering=0)
        self.file.truncate(size)

    def write(self, content: bytes) -> None:
        if self.file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.file.close()


class _Events:
    """One of TensorBoard's event files. PyTorch's writer of them has a thread, whose errors nobody can handle.

    ``start``: what files before it hold of later steps does not count any more.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}"  # they are read in this order
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

    def add(self, step: int, scalars: dict[str, float], pictures: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """``pictures``: PNGs."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        values += [Summary.Value(tag=tag, image=Summary.Image(encoded_image_string=png)) for tag, png in pictures.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())

    def close(self) -> None:
        self.file.close()


def memory_gb(device: torch.device) -> float:
    """The largest amount of memory held so far, in GB: of the GPU, or of this process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def read_log(run: Path) -> list[dict[str, Any]]:
    """What is logged in ``run``, a dictionary a line. Whole lines only: one that a crash or a full disk cut is left out."""
    return [values for _, values in _whole_lines((run / METRICS_FILE).read_bytes())]


def _whole_lines(content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of a log's lines that can be read: where it ends, in bytes, and what it says."""
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            values = json.loads(line)
            readable = line.endswith(b"\n") and math.isfinite(values["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if readable:
            yield end, values


def _end_of(path: Path, step: int) -> int:
    """Of a log's whole lines up to ``step``, in bytes."""
    if not path.exists():
        return 0
    lines = _whole_lines(path.read_bytes())
    return max((end for end, _ in itertools.takewhile(lambda line: line[1]["step"] <= step, lines)), default=0)
