"""A run's incidents: precision fallbacks, the guard's counters and reports, hangs, slow ranks."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xar_scale import reports, watchdog
from xar_scale.errors import DataError, XarScaleError
from xar_scale.report.read import Entries
from xar_scale.validation import validated

COUNTS = {  # the GuardState.counts that only guard events increase, and their titles
    "guard_discarded": "attempts discarded",
    "guard_skipped": "steps skipped",
    "guard_transients": "steps finite only on a retry",
    "guard_quarantined": "samples quarantined",
    "guard_rollbacks": "rollbacks",
}
MOST_RANKS = 1 << 17  # a larger number is not a rank: each one below the largest gets a line
RECENT = 20  # the last measurements, by which ranks are compared


@dataclass(frozen=True)
class Span:
    """Consecutive logged steps in one precision."""

    precision: str
    first: int
    last: int
    after: int  # the logged step before the first, or 0


@dataclass(frozen=True)
class GuardEvent:
    """Increases of the guard's counters between two logged steps."""

    after: int
    step: int
    increases: dict[str, int]  # by title


@dataclass(frozen=True)
class FileReport:
    """Lines about a step, from the guard's or the watchdog's files."""

    step: int
    lines: list[str]


class RankTimes(NamedTuple):
    """Forward seconds (N, R) of the layers on R ranks, in N measurements after ``steps`` (N,)."""

    steps: np.ndarray
    seconds: np.ndarray


class RankTime(NamedTuple):
    """A rank's median over the last measurements, and ``times``, its ratio to the median rank's."""

    rank: int
    seconds: float
    times: float


def spans(entries: Entries) -> list[Span]:
    """Return the precisions of the run, in order."""
    found: list[Span] = []
    before = 0
    for precision, group in itertools.groupby(entries, lambda entry: str(entry.get("precision", "unknown"))):
        steps = [entry["step"] for entry in group]
        found.append(Span(precision, steps[0], steps[-1], before))
        before = steps[-1]
    return found


def guard_events(entries: Entries) -> list[GuardEvent]:
    """Return the increases of counters between logged steps, starting from 0. A rollback may lower them: that is no event."""
    found = []
    for before, entry in itertools.pairwise([{"step": 0}, *entries]):
        differences = {what: entry.get(name, 0) - before.get(name, 0) for name, what in COUNTS.items()}
        if increases := {what: int(difference) for what, difference in differences.items() if 1 <= difference < math.inf}:
            found.append(GuardEvent(before["step"], entry["step"], increases))
    return found


def guard_reports(run: Path) -> list[FileReport]:
    """Return the reports on failed steps; for an unreadable one, the reason."""
    found = []
    for path in (run / reports.FOLDER).glob("step-*.json"):
        try:
            found.append(FileReport(_step(path), [f"{path.name}: {reports.read_summary(path)}"]))
        except (XarScaleError, OSError) as error:
            found.append(FileReport(_step(path), [str(error)]))
    return sorted(found, key=lambda report: (report.step, report.lines))


def hangs(run: Path) -> list[FileReport]:
    """Return the steps that hung, each with the rank that the others waited for."""
    paths = sorted((run / watchdog.FOLDER).glob("step-*-rank-*.txt"))
    return [FileReport(step, list(_hang(list(group)))) for step, group in itertools.groupby(paths, _step)]


def _hang(files: list[Path]) -> Iterator[str]:
    """Yield one line per rank; stacks stay in the files."""
    seen: dict[int, watchdog.RankState] = {}
    for path in files:
        try:
            values, _ = json.JSONDecoder().raw_decode(path.read_text(errors="replace"))
            rank = validated(watchdog.RankState, values, DataError)
            if not 0 <= rank.rank < MOST_RANKS:
                raise DataError(f"rank {rank.rank}")
            seen[rank.rank] = rank
        except (DataError, ValueError, OSError, RecursionError):
            yield f"{path.name} cannot be read"
    try:
        yield from [*watchdog.diagnose(seen, max(seen) + 1)] if seen else []
    except KeyError:
        yield "cannot tell which rank the others waited for: a file lists no collectives"


def rank_times(entries: Entries) -> RankTimes:
    """Return the measurements with the current number of ranks: a run may resume on another number."""
    measured = [(entry["step"], entry["forward_s"]) for entry in entries if entry.get("forward_s")]
    ranks = len(measured[-1][1]) if measured else 0
    same = [(step, seconds) for step, seconds in measured if len(seconds) == ranks]
    return RankTimes(np.array([step for step, _ in same], float), np.array([seconds for _, seconds in same], float))


def slowest(times: RankTimes) -> list[RankTime]:
    """Return all ranks, slowest first."""
    if not len(times.steps):
        return []
    seconds = np.median(times.seconds[-RECENT:], axis=0)
    ratios = seconds / np.median(seconds)
    return [RankTime(int(rank), float(seconds[rank]), float(ratios[rank])) for rank in np.argsort(-seconds, kind="stable")]


def _step(path: Path) -> int:
    """Return the step in a file's name, or 0 for a foreign file."""
    found = re.match(r"step-(\d+)", path.name)
    return int(found[1]) if found else 0
