"""What went wrong in a run, and when: precisions that it fell back to, the guard's counts and reports, hangs, slow ranks."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xar_scale import reports, watchdog
from xar_scale.errors import XarScaleError
from xar_scale.report.read import Entries

COUNTS = {  # of GuardState.counts those that only an event raises, and what they count
    "guard_discarded": "attempts discarded",
    "guard_skipped": "steps gone without",
    "guard_transients": "second attempts that came out otherwise",
    "guard_quarantined": "samples taken out",
    "guard_rollbacks": "rolled back",
}
RECENT = 20  # measurements that ranks are compared by


@dataclass(frozen=True)
class Span:
    """Logged steps in a row in one precision."""

    precision: str
    first: int
    last: int
    after: int  # the logged step before the first, or 0


@dataclass(frozen=True)
class GuardEvent:
    """What counts have risen by between two logged steps."""

    after: int
    step: int
    risen: dict[str, int]  # by what is counted


@dataclass(frozen=True)
class Told:
    """Lines about a step, from files that tell of it."""

    step: int
    lines: list[str]


class RankTimes(NamedTuple):
    """Seconds (N, R) that the layers of R ranks computed in N measurements, after ``steps`` (N,)."""

    steps: np.ndarray
    seconds: np.ndarray


class RankTime(NamedTuple):
    """Of the last measurements the median, and in times the median rank's."""

    rank: int
    seconds: float
    times: float


def spans(entries: Entries) -> list[Span]:
    """The precisions of the run, in order."""
    found: list[Span] = []
    before = 0
    for precision, group in itertools.groupby(entries, lambda entry: str(entry.get("precision", "unknown"))):
        steps = [entry["step"] for entry in group]
        found.append(Span(precision, steps[0], steps[-1], before))
        before = steps[-1]
    return found


def guard_events(entries: Entries) -> list[GuardEvent]:
    """A run begins with counts of 0; a rollback may take some of them back, which is no event."""
    found = []
    for before, entry in itertools.pairwise([{"step": 0}, *entries]):
        rises = {what: int(entry.get(name, 0) - before.get(name, 0)) for name, what in COUNTS.items()}
        if risen := {what: rise for what, rise in rises.items() if rise > 0}:
            found.append(GuardEvent(before["step"], entry["step"], risen))
    return found


def guard_reports(run: Path) -> list[Told]:
    """What is written of steps that failed; of one that cannot be read, why."""
    found = []
    for path in (run / reports.FOLDER).glob("step-*.json"):
        try:
            found.append(Told(_step(path), [f"{path.name}: {reports.read_summary(path)}"]))
        except (XarScaleError, OSError) as error:
            found.append(Told(_step(path), [str(error)]))
    return sorted(found, key=lambda told: (told.step, told.lines))


def hangs(run: Path) -> list[Told]:
    """Steps that hung, each with whom the others waited for."""
    paths = sorted((run / watchdog.FOLDER).glob("step-*-rank-*.txt"))
    return [Told(step, list(_hang(list(group)))) for step, group in itertools.groupby(paths, _step)]


def _hang(files: list[Path]) -> Iterator[str]:
    """What the ranks saw, a line each; stacks stay in the files."""
    seen: dict[int, watchdog.RankState] = {}
    for path in files:
        try:
            values, _ = json.JSONDecoder().raw_decode(path.read_text(errors="replace"))
            rank = watchdog.RankState(**values)
            seen[rank.rank] = rank
        except (ValueError, TypeError, OSError):
            yield f"{path.name} cannot be read"
    try:
        yield from [*watchdog.diagnose(seen, max(seen) + 1)] if seen else []
    except KeyError:
        yield "whom the others waited for cannot be told: a file lacks its collectives"


def rank_times(entries: Entries) -> RankTimes:
    """Of as many ranks as there are in the last measurement: a run may go on with another number of them."""
    measured = [(entry["step"], entry["forward_s"]) for entry in entries if entry.get("forward_s")]
    ranks = len(measured[-1][1]) if measured else 0
    same = [(step, seconds) for step, seconds in measured if len(seconds) == ranks]
    return RankTimes(np.array([step for step, _ in same], float), np.array([seconds for _, seconds in same], float))


def slowest(of: RankTimes) -> list[RankTime]:
    """All ranks, the slowest first."""
    if not len(of.steps):
        return []
    seconds = np.median(of.seconds[-RECENT:], axis=0)
    times = seconds / np.median(seconds)
    return [RankTime(int(rank), float(seconds[rank]), float(times[rank])) for rank in np.argsort(-seconds, kind="stable")]


def _step(path: Path) -> int:
    """Of a file's name; of one that is none of ours, 0."""
    found = re.match(r"step-(\d+)", path.name)
    return int(found[1]) if found else 0
