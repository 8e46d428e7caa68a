"""Render the page: a run's data, curves and images in one self-contained HTML file."""

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from xar_scale.model.xar import meta_model
from xar_scale.report import artifacts, incidents
from xar_scale.report.curves import curve, plot, plot_ranks
from xar_scale.report.read import Entries, read_run
from xar_scale.stragglers import SLOW
from xar_scale.version import __version__

SLOWEST = 8  # ranks that are listed


class Chart(NamedTuple):
    title: str
    note: str
    svg: Markup


class Incident(NamedTuple):
    """A row of the table of incidents."""

    step: int
    kind: str  # guard, report or hang
    when: str
    lines: list[str]


def build_page(path: Path) -> str:
    """Return the HTML report of the run in ``path``, the same for the same files.

    Raises UsageError if there is no run or no matplotlib, ConfigError if its config cannot be read.
    """
    run = read_run(path)
    checkpoints, evaluations = artifacts.checkpoints(path), artifacts.evaluations(path)
    events = incidents.guard_events(run.entries)
    manifests = [entry.manifest for entry in checkpoints if entry.manifest and not entry.problem]
    times = incidents.rank_times(run.entries)
    slowest = incidents.slowest(times)
    metrics = list(dict.fromkeys(name for entry in evaluations for name in entry.metrics))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"utc": _utc, "size": _size, "number": _number}
    return environment.get_template("page.html.jinja").render(
        run=run,
        name=path.resolve().name,
        version=__version__,
        done=max([*(entry["step"] for entry in run.entries), *(manifest.step for manifest in manifests)], default=0),
        ranks=len(slowest) or (manifests[-1].world if manifests else 0),
        parameters=sum(parameter.numel() for parameter in meta_model(run.config.model).parameters()),
        last=run.entries[-1] if run.entries else {},
        charts=_charts(run.entries, [event.step for event in events]),
        spans=incidents.spans(run.entries),
        incidents=_incidents(path, events),
        slowest=slowest[:SLOWEST],
        slow=SLOW,
        recent=min(incidents.RECENT, len(times.steps)),
        rank_chart=Markup(plot_ranks("ranks", times.steps, 1000 * times.seconds)) if len(slowest) > 1 else "",
        checkpoints=checkpoints,
        grids=artifacts.sample_grids(path),
        evaluations=evaluations,
        metrics=[name for name in metrics if name.removesuffix("_std") not in set(metrics) - {name}],
    )


def _charts(entries: Entries, events: Sequence[int]) -> list[Chart]:
    if not entries:
        return []
    images, flops = entries[-1].get("images_per_s"), entries[-1].get("tflops_per_s")
    ratio = flops / images if images and flops else 0.0  # the same at every step
    right = ratio if 0 < ratio < math.inf else 0.0
    wait = curve(entries, "data_wait_s", per="step_s")
    both = "images/s" + ("; TFLOP/s on the right axis" if right else "")
    drawn = [
        ("Loss", "", plot("loss", curve(entries, "loss"), "linear", marks=events)),
        ("Gradient norm", "before clipping", plot("norm", curve(entries, "grad_norm"), "log", marks=events)),
        ("Learning rate", "", plot("rate", curve(entries, "lr"), smooth=False)),
        ("Throughput", both, plot("throughput", curve(entries, "images_per_s"), right=right)),
        ("Waiting for data", "% of step time", plot("wait", wait._replace(values=100 * wait.values))),
        ("Memory", "GB, peak so far, rank 0", plot("memory", curve(entries, "memory_gb"), smooth=False)),
    ]
    return [Chart(title, note, Markup(svg)) for title, note, svg in drawn]


def _incidents(run: Path, events: Sequence[incidents.GuardEvent]) -> list[Incident]:
    found = []
    for event in events:
        increases = [f"{what}: {count}" for what, count in event.increases.items()]
        found.append(Incident(event.step, "guard", f"{event.after:,} to {event.step:,}", increases))
    for kind, found_reports in (("report", incidents.guard_reports(run)), ("hang", incidents.hangs(run))):
        found += [Incident(report.step, kind, f"{report.step:,}", report.lines) for report in found_reports]
    return sorted(found)


def _utc(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):  # NaN, or after the year 9999
        return "at an unknown time"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _number(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 1e4:
        return f"{value:,.4g}"
    if isinstance(value, int):
        return f"{value:,}"  # of any size, where a float would overflow
    return f"{value:,.0f}" if isinstance(value, float) else str(value)
