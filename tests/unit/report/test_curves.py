"""The curves of a report."""

import re

import numpy as np
import pytest

from tests.unit.guarded_run import NAN
from tests.unit.run_folder import logged
from xar_scale.report import curves
from xar_scale.report.curves import Curve, plot


def test_curves_are_drawn_in_the_colours_of_the_page():
    picture = plot("loss", Curve(np.arange(1.0, 50), np.arange(1.0, 50)), marks=[10, 20])
    assert all(f"var(--{name})" in picture for name in ("ink", "raw", "accent", "warn"))
    assert not re.search("#[0-9a-f]{6}", picture) and "<style" not in picture
    labels = re.findall(r'text-anchor: end[^>]* x="([\d.]+)"', picture)
    assert labels and all(float(x) < 30 for x in labels)  # the frame uses the available width


def arrows(picture: str) -> int:
    return picture.count("<use ")


def test_a_spike_does_not_flatten_the_curve_and_is_marked():
    values = np.linspace(1, 0.5, 200)
    values[[50, 60, 70]] = 1000.0, NAN, np.inf
    picture = plot("loss", Curve(np.arange(200.0), values), "linear")
    assert arrows(picture) == 3
    labels = [float(label) for label in re.findall(r">([\d.]+)</text>", picture)]
    assert 0.6 in labels and 1000.0 not in labels
    assert arrows(plot("norm", Curve(np.arange(200.0), values), "log")) == 2  # a log scale has room for the spike


@pytest.mark.parametrize("values", [[], [NAN], [1.0], [0.0, 0.0], [0.0, -1.0, NAN], [3.0, 3.0, 3.0]])
@pytest.mark.parametrize("scale", ["linear", "from 0", "log"])
def test_curves_of_little(values, scale):
    assert "</svg>" in plot("loss", Curve(np.arange(len(values), dtype=float), np.array(values)), scale)


def test_values_that_are_not_numbers_are_not_plotted():
    entries = [logged(10), logged(20, data_wait_s=None), {"step": 30}, logged(40, step_s=0.0)]
    steps, values = curves.curve(entries, "data_wait_s", per="step_s")
    assert steps.tolist() == [10, 40] and values.tolist() == [0.2, np.inf]


def test_a_long_curve_keeps_its_extremes_and_is_small():
    values = np.random.default_rng(0).normal(1, 0.01, 50_000)
    values[12_345], values[23_456] = 1.5, 0.5
    thin = curves._downsampled(Curve(np.arange(50_000.0), values))
    assert len(thin.steps) <= 2 * curves.BUCKETS and {12_345.0, 23_456.0} <= set(thin.steps)
    assert (np.diff(thin.steps) > 0).all()
    assert len(plot("loss", Curve(np.arange(50_000.0), values))) < 100_000


def test_smoothing_follows_the_curve_and_passes_over_what_is_not_finite():
    values = np.linspace(0, 1, 400)
    values[100:103] = NAN
    smoothed = curves._smoothed(values)
    assert np.isnan(smoothed[100:103]).all() and np.nanmax(np.abs(smoothed - values)[20:-20]) < 0.005
    noise = np.random.default_rng(0).normal(size=400)
    assert curves._smoothed(noise).std() < 0.5 * noise.std()
