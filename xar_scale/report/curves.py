"""Plot curves over a run's steps as inline SVG, with real text and the page's colours."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from xar_scale.errors import UsageError
from xar_scale.report.read import Entries

WIDTH, HEIGHT = 440, 230  # SVG units, 72 per matplotlib inch
BUCKETS = 400  # of a long curve; of each the minimum and the maximum are drawn
SPIKE = 10  # times the 99th percentile; larger values are spikes
SMOOTHING = 40, 5  # the window is this fraction (1/40) of the curve, and at least this many values
# matplotlib has no CSS variables: these colours stand for them and are replaced afterwards
COLOURS = {"#010101": "ink", "#020202": "line", "#030303": "raw", "#040404": "accent", "#050505": "warn"}
INK, LINE, RAW, ACCENT, WARN = COLOURS


class Curve(NamedTuple):
    """``values`` (N,) after ``steps`` (N,), in order; values may be NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray


def curve(entries: Entries, name: str, per: str = "") -> Curve:
    """Return the metric ``name``, divided by the metric ``per`` if given, from entries in which they are numbers."""
    names = [name, per] if per else [name]
    known = [entry for entry in entries if all(isinstance(entry.get(key), int | float) for key in names)]
    steps, values = (np.array([entry[key] for entry in known], float) for key in ("step", name))
    with np.errstate(divide="ignore", invalid="ignore"):
        return Curve(steps, values / np.array([entry[per] for entry in known], float) if per else values)


def plot(
    name: str,
    data: Curve,
    scale: Literal["linear", "from 0", "log"] = "from 0",
    *,
    smooth: bool = True,
    marks: Sequence[int] = (),
    right: float = 0,
) -> str:
    """Return an SVG of one curve, raw and, on top of it, smoothed.

    ``name``: unique within a page. ``marks``: steps to mark with vertical lines. ``right``: factor of a second axis on the
    right; 0: none. Values that are not finite, or far above the rest, are drawn as arrows at the upper edge. Raises UsageError
    without matplotlib.
    """

    def paint(axes: Any) -> None:
        log = scale == "log"
        beyond = ~(data.values <= _upper_limit(data.values)) if not log else ~np.isfinite(data.values)
        shown = np.where(beyond | (log & (data.values <= 0)), np.nan, data.values)
        if log:
            axes.set_yscale("log")
        dot = "." if len(data.steps) == 1 else ""
        axes.plot(*_downsampled(Curve(data.steps, shown)), color=RAW if smooth else ACCENT, linewidth=1.2, marker=dot)
        if smooth:
            smoothed = np.exp(_smoothed(np.log(shown))) if log else _smoothed(shown)
            axes.plot(*_downsampled(Curve(data.steps, smoothed)), color=ACCENT, linewidth=1.6)
        edge = axes.get_xaxis_transform()
        arrows = axes.plot(
            data.steps[beyond], np.ones(beyond.sum()), "^", color=WARN, markersize=5, transform=edge, clip_on=False
        )
        arrows[0].set_in_layout(False)  # empty, it would count as a point in the corner of the layout
        axes.vlines(list(marks), 0, 1, color=WARN, linewidth=0.8, linestyle="dotted", transform=edge)
        if scale == "from 0":
            axes.set_ylim(bottom=0)
        if right:
            axes.secondary_yaxis("right", functions=(lambda value: value * right, lambda value: value / right))

    return _svg(name, paint)


def plot_ranks(name: str, steps: np.ndarray, values: np.ndarray) -> str:
    """Return an SVG of ``values`` (N, R) of R ranks after ``steps`` (N,): their range, and the median over ranks."""

    def paint(axes: Any) -> None:
        least, most = (_downsampled(Curve(steps, edge)) for edge in (values.min(axis=1), values.max(axis=1)))
        axes.fill_between(least.steps, least.values, np.interp(least.steps, *most), color=RAW, linewidth=0.5)
        axes.plot(*_downsampled(Curve(steps, np.median(values, axis=1))), color=ACCENT, linewidth=1.6)
        axes.set_ylim(bottom=0)

    return _svg(name, paint)


def _upper_limit(values: np.ndarray) -> float:
    """Return a limit for the axis that cuts off spikes, which would flatten the rest. A loss's initial values are no spike."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0
    most, usual = float(finite.max()), float(np.percentile(finite, 99))
    return 2 * usual if most > SPIKE * usual > 0 else most


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the weighted moving average (Hann window). Non-finite values are ignored and come out as NaN."""
    part, least = SMOOTHING
    if not len(values):
        return values
    kernel = np.hanning(min(max(len(values) // part, least), len(values)) + 2)[1:-1]
    there = np.isfinite(values)
    total, weight = (np.convolve(signal, kernel, "same") for signal in (np.where(there, values, 0), there))
    return np.where(there, total / np.where(there, weight, 1), np.nan)


def _downsampled(data: Curve) -> Curve:
    """Return the minimum and maximum of each bucket: the curve looks the same."""
    if len(data.steps) <= 2 * BUCKETS:
        return data
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(len(data.steps)), BUCKETS):
        values = data.values[stretch]
        finite = np.isfinite(values)
        kept |= {stretch[np.where(finite, values, np.inf).argmin()], stretch[np.where(finite, values, -np.inf).argmax()]}
    chosen = sorted(kept)
    return Curve(data.steps[chosen], data.values[chosen])


def _svg(name: str, paint: Callable[[Any], None]) -> str:
    """Return the figure as SVG: byte-identical for the same values, without external references."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    except ImportError:
        raise UsageError("the report needs matplotlib: pip install 'xar_scale[evaluate]'") from None
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}
    settings |= {"font.size": 10.5, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE, "grid.color": LINE}
    settings |= {
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "lines.solid_joinstyle": "round",
    }
    file = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.margins(x=0.01)
        paint(axes)
        for axis in (axes.xaxis, axes.yaxis, *(child.yaxis for child in axes.child_axes)):
            axis.set_major_formatter(FuncFormatter(_tick))
        if axes.get_yscale() == "log":
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(FuncFormatter(_tick) if high < 1000 * low else NullFormatter())
        axes.tick_params(which="both", length=0)
        for child in axes.child_axes:
            child.spines[:].set_visible(False)
            child.tick_params(length=0)
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _embeddable(file.getvalue())


def _tick(value: float, _: int | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def _embeddable(svg: str) -> str:
    """Strip the XML header, sizes, styles and group IDs (not unique within a page), and insert the CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", re.sub(r"<style.*?</style>", "", svg))
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
