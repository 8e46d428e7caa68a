"""A benchmark record as JSON: numbers, machine and command; and its comparison with another of the same settings."""

import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xar_scale.errors import UsageError, XarScaleError
from xar_scale.validation import validated

OURS, BASELINE, PUBLISHED = "ours", "baseline", "published"
SLOWER = 1.15  # slowdown against an earlier record, relative to the baseline, that is an error


class SlowerError(XarScaleError):
    """Slower than in the earlier record."""


@dataclass(frozen=True)
class Record:
    """One measurement.

    ``seconds``: for each case the time of each turn. Cases take turns: entries i of all cases were measured in a row.
    ``images``: trained on or generated in a turn. ``flops``: of our matrix products in a turn, without recomputation.
    """

    what: str
    settings: dict[str, Any]
    images: int
    seconds: dict[str, list[float]]
    flops: float | None = None
    peak: float | None = None  # FLOP/s: from the GPU's data sheet, or measured with a large matrix product
    memory_gb: float | None = None  # our peak, with weights and moments
    data_wait_s: float | None = None  # per turn
    communication_s: float | None = None  # per turn
    hidden_s: float | None = None  # part of communication_s that overlaps with compute
    machine: str = field(default_factory=lambda: _machine())
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    command: str = field(default_factory=lambda: _command())

    def median(self, case: str) -> float:
        return statistics.median(self.seconds[case])

    def spread(self, case: str) -> float:
        """(largest - smallest) / median."""
        return (max(self.seconds[case]) - min(self.seconds[case])) / self.median(case)

    def speedup(self, case: str) -> float:
        """How many times as long ``case`` takes as ours: the median of the ratios of each turn."""
        return statistics.median(self._ratios(case))

    def scatter(self, case: str) -> float:
        """(largest - smallest) ratio of the turns, as a share of ``speedup``."""
        ratios = self._ratios(case)
        return (max(ratios) - min(ratios)) / self.speedup(case)

    def _ratios(self, case: str) -> list[float]:
        return [theirs / ours for theirs, ours in zip(self.seconds[case], self.seconds[OURS], strict=True)]

    @property
    def mfu(self) -> float | None:
        return self.flops / self.median(OURS) / self.peak if self.flops and self.peak else None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read_record(path: Path) -> Record:
    """Raises UsageError if the file cannot be read or is not a record."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path} is not JSON") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}, not a record")
    record = validated(Record, values, UsageError, where=f"{path}: ")
    lengths = {len(taken) for taken in record.seconds.values()}
    if not {OURS, BASELINE} <= {*record.seconds} or len(lengths) > 1 or 0 in lengths:
        raise UsageError(
            f"{path}: seconds must have {OURS} and {BASELINE}, with the same number of turns for each case and at least one"
        )
    return record


def check_same_work(what: str, settings: dict[str, Any], before: Record) -> None:
    """Raises UsageError that names the first setting that differs in ``before``."""
    here, there = {"what": what} | settings, {"what": before.what} | before.settings
    for key in [*here, *there]:
        if here.get(key) != there.get(key):
            values = f"{key} is {here.get(key)!r}, but {there.get(key)!r} in the record to compare with"
            raise UsageError(f"not the same work: {values}")


def compare(now: Record, before: Record) -> str:
    """Describe the change in time relative to the baseline. Raises SlowerError if it grew by more than a factor of SLOWER,
    UsageError if the records are not of the same work."""
    check_same_work(now.what, now.settings, before)
    share, earlier = 1 / now.speedup(BASELINE), 1 / before.speedup(BASELINE)
    said = f"{share:.2f} of the baseline's time, was {earlier:.2f} on {before.date}: {share / earlier - 1:+.0%}"
    if (scatter := max(now.scatter(BASELINE), before.scatter(BASELINE))) > SLOWER - 1:
        said += f" (turns differ by {scatter:.0%})"
    if share > SLOWER * earlier:
        raise SlowerError(f"{now.what} became slower by more than {SLOWER - 1:.0%}: {said}")
    return said


def _command() -> str:
    ranks = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if ranks == "1" else ["torchrun", "--nproc-per-node", ranks]
    return shlex.join([*launcher, *sys.argv])


def _machine() -> str:
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{_cpu()}, {torch.get_num_threads()} of {len(os.sched_getaffinity(0))} cores"
    return f"{processor}; Python {platform.python_version()}, torch {torch.__version__}"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def markdown(record: Record) -> str:
    """Return a table of the cases, and a line with the rest."""
    lines = ["| | ms, median | spread | images/s | time / ours |", "| --- | --- | --- | --- | --- |"]
    for case in record.seconds:
        images = "" if case == BASELINE else f"{record.images / record.median(case):.4g}"
        cells = f"{record.median(case) * 1e3:.4g} | {record.spread(case):.0%} | {images} | {record.speedup(case):.2f}"
        lines.append(f"| {case} | {cells} |")
    rest = {
        "MFU": None if record.mfu is None else f"{record.mfu:.0%} of {record.peak or 0:.3g} FLOP/s",
        "memory": None if record.memory_gb is None else f"{record.memory_gb:.2f} GB",
        "data wait": None if record.data_wait_s is None else f"{record.data_wait_s * 1e3:.2f} ms",
        "communication": None
        if record.communication_s is None
        else f"{record.communication_s * 1e3:.1f} ms, {(record.hidden_s or 0) * 1e3:.1f} ms of it overlapped",
    }
    lines += ["", "; ".join(f"{name}: {value}" for name, value in rest.items() if value is not None)]
    return "\n".join(lines)
