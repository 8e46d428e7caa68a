"""The page: what a run's folder holds, its curves and pictures, in one HTML file that needs no other."""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from xar_scale.model.xar import meta_model
from xar_scale.report import kept, trouble
from xar_scale.report.curves import curve, draw, draw_ranks
from xar_scale.report.read import Entries, read_run
from xar_scale.stragglers import SLOW
from xar_scale.version import __version__

SLOWEST = 8  # ranks that are named


class Chart(NamedTuple):
    title: str
    note: str
    svg: Markup


class Happened(NamedTuple):
    """A line of the table of what went wrong."""

    step: int
    kind: str  # guard, report or hang
    when: str
    lines: list[str]


def build_page(path: Path) -> str:
    """The HTML of the run in ``path``, the same for the same files.

    Raises UsageError where there is no run, or no matplotlib, and ConfigError where its config cannot be read.
    """
    run = read_run(path)
    checkpoints, evaluations, events = kept.checkpoints(path), kept.evaluations(path), trouble.guard_events(run.entries)
    manifests = [entry.manifest for entry in checkpoints if entry.manifest and not entry.problem]
    times = trouble.rank_times(run.entries)
    slowest = trouble.slowest(times)
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
        spans=trouble.spans(run.entries),
        happened=_happened(path, events),
        slowest=slowest[:SLOWEST],
        slow=SLOW,
        recent=min(trouble.RECENT, len(times.steps)),
        rank_chart=Markup(draw_ranks("ranks", times.steps, 1000 * times.seconds)) if len(slowest) > 1 else "",
        checkpoints=checkpoints,
        pictures=kept.pictures(path),
        evaluations=evaluations,
        metrics=[name for name in metrics if name.removesuffix("_std") not in set(metrics) - {name}],
    )


def _charts(entries: Entries, events: Sequence[int]) -> list[Chart]:
    if not entries:
        return []
    images, flops = entries[-1].get("images_per_s"), entries[-1].get("tflops_per_s")
    right = flops / images if images and flops else 0.0  # one is as many times the other at every step
    wait = curve(entries, "data_wait_s", per="step_s")
    both = "images/s" + (", and on the right TFLOP/s" if right else "")
    drawn = [
        ("Loss", "", draw("loss", curve(entries, "loss"), "linear", marks=events)),
        ("Gradient norm", "before clipping", draw("norm", curve(entries, "grad_norm"), "log", marks=events)),
        ("Learning rate", "", draw("rate", curve(entries, "lr"), smooth=False)),
        ("Throughput", both, draw("throughput", curve(entries, "images_per_s"), right=right)),
        ("Waiting for data", "% of a step", draw("wait", wait._replace(values=100 * wait.values))),
        ("Memory", "GB, the most so far, rank 0", draw("memory", curve(entries, "memory_gb"), smooth=False)),
    ]
    return [Chart(title, note, Markup(svg)) for title, note, svg in drawn]


def _happened(run: Path, events: Sequence[trouble.GuardEvent]) -> list[Happened]:
    found = []
    for event in events:
        risen = [f"{what}: {count}" for what, count in event.risen.items()]
        found.append(Happened(event.step, "guard", f"{event.after:,} to {event.step:,}", risen))
    for kind, all_told in (("report", trouble.guard_reports(run)), ("hang", trouble.hangs(run))):
        found += [Happened(told.step, kind, f"{told.step:,}", told.lines) for told in all_told]
    return sorted(found)


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _number(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 1e4:
        return f"{value:,.4g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)
