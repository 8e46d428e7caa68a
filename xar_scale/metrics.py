"""What a run says while it runs: TensorBoard, one JSON line a logging step, a progress bar or plain lines. Rank 0 only."""

import json
import math
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import Self

from xar_scale.files import write_atomically

METRICS_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"


class Metrics:
    """A context manager. ``start`` is the step a resumed run goes on from: what was logged after it is dropped."""

    def __init__(self, run: Path, start: int, steps: int) -> None:
        self.run, self.steps = run, steps
        self._open(start)
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

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import: rank 0 of a training run alone needs it

        path = self.run / METRICS_FILE
        kept = [line for line in _lines(path) if _step(line) <= start]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self.file = path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(self.run / TENSORBOARD_FOLDER), purge_step=start + 1)

    def go_back(self, step: int) -> None:
        """The run goes on from ``step``: drop what was logged after it."""
        self.tensorboard.close()
        self.file.close()
        self._open(step)
        self.advance(step)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        self.tensorboard.close()
        self.file.close()

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        self.progress.update(self.task, completed=step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record ``values`` after ``step`` steps, and say the ones that matter."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, str):
                continue
            self.tensorboard.add_scalar(f"train/{name}", value, step)
        summary = f"loss {values['loss']:.4f}  {values['images_per_s']:.0f} images/s"
        self.progress.update(self.task, summary=summary)
        if self.progress.disable:
            left = (self.steps - step) * values["step_s"]
            print(
                f"step {step}/{self.steps}  {summary}  lr {values['lr']:.2e}  grad norm {values['grad_norm']:.3f}  "
                f"data wait {values['data_wait_s']:.3f} s/step  ETA {left:.0f} s",
                flush=True,
            )


def memory_gb(device: torch.device) -> float:
    """The largest amount of memory held so far, in GB: of the GPU, or of this process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _step(line: str) -> float:
    """The step of a log line; beyond every step where it cannot be read, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; one cut by a crash is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]
