"""The report of a run: what is read from its folder, and the page."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.processes import ROOT
from tests.unit.guarded_run import NAN, Guarded
from tests.unit.tiny_run import CONFIG, Run
from xar_scale.checkpoint import manifest
from xar_scale.cli import main
from xar_scale.errors import ConfigError, UsageError
from xar_scale.guard import GuardState
from xar_scale.metrics import Metrics, read_log
from xar_scale.report import artifacts, curves, incidents
from xar_scale.report.curves import Curve, plot
from xar_scale.report.page import build_page
from xar_scale.report.read import read_run
from xar_scale.watchdog import RankState

STEPS = CONFIG.train.steps
CALM = GuardState()


def logged(step: int, counts: GuardState = CALM, **changes) -> dict:
    values = {"step": step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 2.0, "images_per_s": 100.0, "tflops_per_s": 5.0}
    values |= {"step_s": 0.5, "data_wait_s": 0.1, "memory_gb": 1.5, "precision": "bf16", "forward_s": [0.25], **counts.counts}
    return values | changes


def write_run(folder, entries=None):
    """Write a run's folder as training does, with these entries in its log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.to_yaml())
    entries = [logged(step) for step in range(10, 101, 10)] if entries is None else entries
    with Metrics(folder, 0, STEPS) as metrics:
        for entry in entries:
            metrics.log(entry["step"], {name: value for name, value in entry.items() if name != "step"})
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def text_of(page: str) -> str:
    """Return the visible text, without curves."""
    text = re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(text).split())


def draw_samples(run, steps, size=(40, 30)) -> None:
    (run / "samples").mkdir(exist_ok=True)
    for step in steps:
        Image.new("RGB", size, (step % 256, 10, 10)).save(run / "samples" / f"step-{step:08d}.png")


def test_the_head_says_what_is_training_and_how_far_it_is(run):
    (run / "heartbeat.json").write_text(json.dumps({"step": 107, "time": 1.8e9, "host": "node-7", "pid": 4242}))
    text = text_of(build_page(run))
    parameters = sum(np.prod(shape) for shape in Run(run.parent / "other").engine.shapes.values())
    assert f"Steps 100 of {STEPS}" in text and "not finished" in text
    assert f"{parameters:,} parameters: width 16, 2 + 2 blocks, 2 heads" in text and "single on 1 rank, fp32" in text
    assert "step 107 started 2027-01-15 08:00 UTC, on node-7, process 4242" in text
    (begun,) = (run / "tensorboard").iterdir()
    begun.rename(begun.with_name("events.out.tfevents.1700000000.000000.host"))
    assert "Started 2023-11-14 22:13 UTC" in text_of(build_page(run))


def test_a_run_is_finished_after_its_last_step(run):
    write_run(run, [logged(STEPS)])
    assert 'class="state finished"' in build_page(run)


def test_a_real_run_with_its_checkpoints(tmp_path):
    run = tmp_path / "run"
    trained = Run(run, keep_last=3)
    paths = []
    for _ in range(3):
        trained.train()
        paths.append(trained.save())
    write_run(run, [])
    assert [entry.latest for entry in artifacts.checkpoints(run)] == [False, False, True]
    (paths[1] / "manifest.json").write_text("{torn")
    paths[2].rename(paths[2].with_name("damaged-step-00000003"))
    (run / "checkpoints" / "latest").write_text("step-00000001\n")
    first, torn, aside = artifacts.checkpoints(run)
    assert (first.name, first.latest, first.problem) == ("step-00000001", True, "")
    assert (first.manifest.step, first.manifest.world, first.manifest.engine, first.manifest.precision) == (
        1,
        1,
        "single",
        "fp32",
    )
    assert (torn.name, torn.manifest, torn.problem) == ("step-00000002", None, "manifest.json is torn or changed")
    assert aside.manifest.step == 3 and aside.problem.startswith("set aside")
    text = text_of(build_page(run))
    assert "step-00000001 latest" in text and "manifest.json is torn or changed" in text and "Nothing is logged yet" in text
    assert f"Steps 1 of {STEPS}" in text  # checkpoints that were set aside or cannot be read do not count


def test_files_of_checkpoints_are_not_read(run, monkeypatch):
    trained = Run(run)
    trained.train()
    for file in trained.save().glob("*.safetensors"):
        file.unlink()
    assert artifacts.checkpoints(run)[0].problem == ""


def test_a_torn_last_line_is_left_out(run):
    whole = build_page(run)
    log, written = (run / "metrics.jsonl").read_text(), (run / "metrics.jsonl").stat().st_mtime
    for torn in (json.dumps(logged(110)), json.dumps(logged(110))[:40]):
        (run / "metrics.jsonl").write_text(log + torn)
        assert [entry["step"] for entry in read_log(run)] == list(range(10, 101, 10))
    os.utime(run / "metrics.jsonl", (written, written))  # the page shows it
    assert text_of(build_page(run)) == text_of(whole)


def test_precisions_and_guard_counters(tmp_path):
    again = GuardState(discarded=2, transients=1)
    later = replace(again, discarded=3, quarantined=8, lowered=True, scale=2.0)
    back = replace(later, discarded=1)  # a state from before, after a rollback
    counts = [CALM, again, again, later, back]
    modes = ["bf16", "bf16", "tf32", "tf32", "bf16"]
    entries = [logged(10 * n, count, precision=mode) for n, count, mode in zip(range(1, 6), counts, modes, strict=True)]
    spans = [(span.precision, span.after, span.first, span.last) for span in incidents.spans(entries)]
    assert spans == [("bf16", 0, 10, 20), ("tf32", 20, 30, 40), ("bf16", 40, 50, 50)]
    first, second = incidents.guard_events(entries)
    assert (first.after, first.step) == (10, 20)
    assert first.increases == {"attempts discarded": 2, "steps finite only on a retry": 1}
    assert (second.step, second.increases) == (40, {"attempts discarded": 1, "samples quarantined": 8})
    page = build_page(write_run(tmp_path / "run", entries))
    assert "bf16 at steps 10 to 20, then tf32 at steps 30 to 40, then bf16 at steps 50 to 50" in text_of(page)
    assert "10 to 20 guard counters attempts discarded: 2" in text_of(page)
    assert page.count('<i class="guard" style=') == 2
    assert 'class="tf32" style="left:40.000%;width:40.000%"' in page


def test_an_event_before_the_first_logged_step_is_seen():
    (event,) = incidents.guard_events([logged(10, GuardState(skipped=1)), logged(20, GuardState(skipped=1))])
    assert (event.after, event.step, event.increases) == (0, 10, {"steps skipped": 1})


def test_all_counts_of_events_are_known():
    assert set(GuardState().counts) - {"guard_lowered", "guard_scale"} == set(incidents.COUNTS)


def test_reports_of_the_guard_also_without_their_batch_and_torn(tmp_path, monkeypatch):
    run = Guarded(tmp_path / "run", "train.precision=bf16")
    run.spoil(monkeypatch, 2)
    run.resolve()
    write_run(tmp_path / "run")
    (batch,) = (tmp_path / "run" / "reports").glob("*.safetensors")
    batch.unlink()
    (tmp_path / "run" / "reports" / "step-00000002.json").write_text("{")
    torn, whole = incidents.guard_reports(tmp_path / "run")
    assert (torn.step, whole.step) == (2, 5) and "torn or changed" in torn.lines[0]
    assert "rank 0" in whole.lines[0] and "tf32: not finite: nothing; step, precision was to blame" in whole.lines[0]
    assert "first in the gradient of out_proj's output" in text_of(build_page(tmp_path / "run"))


def test_hangs_name_the_rank_that_the_others_waited_for(run):
    (run / "hangs").mkdir()
    for rank, count in ((0, 40), (1, 39)):
        seen = RankState(
            rank, f"node-{rank}", 7, 70, "wait (x.py:3)", {"0 world": count}, {"0 world": f"all_reduce number {count}"}
        )
        text = json.dumps(vars(seen), indent=1) + "\n\nThread 0x1\n"
        (run / "hangs" / f"step-00000070-rank-{rank}.txt").write_text(text)
    (run / "hangs" / "step-00000070-rank-2.txt").write_text("")
    (hang,) = incidents.hangs(run)
    assert hang.step == 70 and hang.lines[0] == "step-00000070-rank-2.txt cannot be read"
    assert "rank 1 (node-1, process 7) has not entered all_reduce number 40, where other ranks wait" in hang.lines[1]
    assert "rank 1 (node-1" in text_of(build_page(run))


def test_slow_ranks_are_named_and_another_number_of_ranks_is_not_mixed_in(tmp_path):
    before = [logged(step, forward_s=[9.0, 1.0]) for step in (10, 20)]
    now = [logged(step, forward_s=[1.0, 1.1, 2.0, 0.9]) for step in range(30, 301, 10)]
    del now[3]["forward_s"]  # the successful attempt was not the first
    times = incidents.rank_times(before + now)
    assert times.seconds.shape == (27, 4) and times.steps[0] == 30
    slowest = incidents.slowest(times)
    assert [entry.rank for entry in slowest] == [2, 1, 0, 3]
    assert slowest[0].times == pytest.approx(2.0 / 1.05)
    text = text_of(build_page(write_run(tmp_path / "run", before + now)))
    assert "2 2,000 1.90 slow 1 1,100 1.05 0" in text and "single on 4 ranks" in text


def test_sample_grids_newest_large_and_an_even_choice_of_many(run):
    draw_samples(run, range(1, 101), size=(2000, 500))
    shown = artifacts.sample_grids(run)
    steps = [picture.step for picture in shown]
    assert len(steps) == artifacts.MAX_GRIDS and (steps[0], steps[-1]) == (1, 100)
    assert set(np.diff(steps)) == {4, 5}
    page = build_page(run)
    assert page.count("<img") == artifacts.MAX_GRIDS and page.index("samples after 100") < page.index("samples after 1 steps")
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1]))).size for picture in shown]
    assert sizes == [(480, 120)] * 23 + [(1600, 400)]


def test_a_torn_picture_and_another_file_among_the_samples(run):
    draw_samples(run, [20, 40])
    newest = run / "samples" / "step-00000040.png"
    newest.write_bytes(newest.read_bytes()[:60])
    (run / "samples" / "notes.png").write_text("")
    (run / "samples" / "step-00000060.png").write_text("no picture")
    text = text_of(build_page(run))
    assert "After 20 steps" in text and "step-00000040.png cannot be shown" in text and "step-00000060.png cannot be" in text


def test_a_picture_that_another_program_would_have_to_draw_is_not_opened(run):
    (run / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(run / "samples" / "step-00000020.png", "EPS")
    assert "step-00000020.png cannot be shown: cannot identify image file" in text_of(build_page(run))


def test_evaluations_by_step_of_their_weights(run):
    def write(where: str, step: int | None, **metrics) -> None:
        values = {"metrics": metrics, "weights": {"step": step, "path": "p"}, "features": {"name": "some-features"}}
        values |= {} if step is None else {"set": {"images": 100 * step}}
        (run / where).mkdir(parents=True)
        (run / where / "evaluation.json").write_text(json.dumps(values))

    write("evaluations/a", 700, fid=2.31, inception_score=301.23, inception_score_std=3.1)
    write("evaluations/deep/er", 300, fid=12.5)
    write("evaluations/c", None, recall=0.5)
    (run / "evaluations" / "torn").mkdir()
    (run / "evaluations" / "torn" / "evaluation.json").write_text('{"metrics": ')
    (run / "evaluations" / "list").mkdir()
    (run / "evaluations" / "list" / "evaluation.json").write_text("[]")
    page = text_of(build_page(run))
    assert (
        "Step Images fid inception score recall Folder 300 30,000 12.5 evaluations/deep/er "
        "700 70,000 2.31 301.2 ± 3.1 evaluations/a ? ? 0.5"
    ) in page
    assert "some-features" in page
    assert page.count("is torn or not an evaluation") == 2


def test_files_nested_too_deeply_for_the_parser_are_damaged_ones(run):
    for folder in ("hangs", "evaluations", "reports", "checkpoints/step-00000010"):
        (run / folder).mkdir(parents=True)
    names = ["heartbeat.json", "hangs/step-00000010-rank-0.txt", "evaluations/evaluation.json", "reports/step-00000010.json"]
    for name in (*names, "checkpoints/step-00000010/manifest.json"):
        (run / name).write_text("[" * 100000)
    with (run / "metrics.jsonl").open("a") as log:
        log.write("[" * 100000 + "\n")
    text = text_of(build_page(run))
    assert "Heartbeat none" in text and "Steps 100 of" in text and "step-00000010-rank-0.txt cannot be read" in text
    assert "evaluation.json is torn or not an evaluation" in text and "manifest.json is torn or changed" in text
    assert "step-00000010.json is no step report, or is torn" in text


@pytest.mark.parametrize("value", ["x", [1], {}, None, True, NAN, math.inf, -math.inf, 10**4000, 1e308, -1e308, -5, 0])
@pytest.mark.parametrize("whole", [False, True])
def test_a_log_of_wrong_types_is_no_traceback(tmp_path, value, whole):
    """``whole``: every entry has the value, or only the last one."""
    entries = [logged(10), logged(20), logged(30)]
    for entry in entries[0 if whole else 2 :]:
        entry |= dict.fromkeys(entry.keys() - {"step"}, value)
    run = write_run(tmp_path / "run", [])
    lines = [*entries, logged(40) | {"step": value}, logged(40) | {"forward_s": [value, [1], 1]}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in lines))
    assert f"Steps 40 of {STEPS}" in text_of(build_page(run))


@pytest.mark.parametrize(("images", "tflops"), [(1.0, math.inf), (1e-300, 3e38), (NAN, 1.0), (-1.0, 1.0)])
def test_rates_whose_ratio_is_no_number_have_no_second_axis(tmp_path, images, tflops):
    run = write_run(tmp_path / "run", [logged(10, images_per_s=images, tflops_per_s=tflops)])
    assert "right axis" not in text_of(build_page(run))


@pytest.mark.parametrize("value", ["x", [1], {}, None, NAN, math.inf, 10**4000, 1e300, -5, "\ud800"])
def test_other_files_of_wrong_types_are_no_traceback(run, value):
    for folder in ("hangs", "evaluations", "reports"):
        (run / folder).mkdir()
    (run / "tensorboard" / f"events.out.tfevents.{'9' * 100}.5.host").touch()
    (run / "heartbeat.json").write_text(json.dumps({"step": 1, "time": value, "host": value, "pid": value}))
    seen = vars(RankState(0, "node", 7, 70, "wait", {"0 world": 3}, {"0 world": "all_reduce"}))
    for rank, name in enumerate(seen):
        (run / "hangs" / f"step-00000070-rank-{rank}.txt").write_text(json.dumps(seen | {name: value}))
    evaluated = {"metrics": {"fid": value}, "weights": {"step": value}, "set": {"images": value}}
    (run / "evaluations" / "evaluation.json").write_text(json.dumps(evaluated))
    whole = {"format": 1, "step": 1, "attempts": [], "ranks": [], "batch": {"rank": 0}}
    for number, name in enumerate(whole):
        (run / "reports" / f"step-0000000{number}.json").write_text(json.dumps(whole | {name: value}))
    assert main(["report", str(run)]) == 0
    shown = text_of((run / "report.html").read_text())
    assert "rank-0.txt cannot be read" in shown and "is no step report" in shown


def test_a_manifest_of_wrong_types_is_listed_as_damaged(run):
    trained = Run(run)
    trained.train()
    path = trained.save() / "manifest.json"
    whole = json.loads(path.read_text())
    files = {name: entry | {"bytes": 10**4000} for name, entry in whole["files"].items()}
    for change in ({"step": "x"}, {"step": -1}, {"world": 10**4000}, {"shapes": {"a": [-1]}}, {"files": files}, {"kinds": [1]}):
        values = whole | change
        del values["sha256"]
        path.write_text(json.dumps({"sha256": manifest._digest(values), **values}))
        assert f"step-00000001 latest manifest.json: {next(iter(change))}" in text_of(build_page(run))


def test_names_of_any_bytes_are_shown(run):
    named = run.rename(run.with_name(os.fsdecode(b"run-\xff")))
    done = subprocess.run([sys.executable, "-m", "xar_scale", "report", named], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "run-" in done.stdout
    assert "run-?" in (named / "report.html").read_text()


def test_each_empty_section_says_so(tmp_path):
    text = text_of(build_page(write_run(tmp_path / "run", [])))
    for words in (
        "Nothing is logged yet: metrics are logged every 20 steps (train.log_every)",
        "No precision is logged yet",
        "No incidents: the guard has not acted",
        "No rank is measured yet",
        "No checkpoints yet",
        "No sample grids: set sample.every to generate them",
        "No evaluations",
        "Heartbeat none",
    ):
        assert words in text


def test_text_from_files_is_escaped(run):
    bad = "<script>alert(1)</script>"
    config = (run / "config.yaml").read_text().replace("path: runs/demo/data", f"path: '{bad}'")
    assert bad in config
    (run / "config.yaml").write_text(config)
    (run / "heartbeat.json").write_text(json.dumps({"step": 1, "time": 0, "host": bad, "pid": bad}))
    (run / "evaluations" / "a").mkdir(parents=True)
    evaluated = {"metrics": {bad: bad}, "set": {"images": bad}}
    (run / "evaluations" / "a" / "evaluation.json").write_text(json.dumps(evaluated))
    write_run(run.parent / "other", [logged(10, precision=f'"{bad}')])
    shutil.copy(run.parent / "other" / "metrics.jsonl", run)
    page = build_page(run)
    assert "<script" not in page and page.count("&lt;script&gt;") > 6 and 'class=""' in page


def test_nothing_on_the_page_is_fetched(run):
    draw_samples(run, [20])
    page = build_page(run)
    assert "http" not in page and "@import" not in page and "<link" not in page and "<script" not in page
    references = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)|url\(([^)]*)\)""", page)
    assert references and all(re.match("#|data:", one or other) for one, other in references)


def test_the_page_is_the_same_for_the_same_files(run):
    draw_samples(run, [20, 40])
    assert build_page(run) == build_page(run)


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


def test_the_command_writes_the_page_where_it_is_told(run, capsys, tmp_path):
    assert main(["report", str(run)]) == 0
    size = round((run / "report.html").stat().st_size / 1000)
    assert f"report of {run}: {run / 'report.html'}, {size} kB" in capsys.readouterr().out
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert out.read_text() == (run / "report.html").read_text()


def test_what_is_no_run_is_refused_and_nothing_written(run, capsys, tmp_path):
    out = tmp_path / "new" / "page.html"
    for folder, part in ((tmp_path / "nowhere", "no run at"), (tmp_path, "it has no config.yaml")):
        assert main(["report", str(folder), "--out", str(out)]) == 64
        assert part in (said := capsys.readouterr().err) and said.count("\n") == 1
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match=r"it has no metrics\.jsonl"):
        read_run(run)
    assert not out.parent.exists()


def test_a_config_of_another_version_is_named(run):
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\nnosuch: 1\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: unknown key nosuch"):
        read_run(run)


def test_without_matplotlib_the_user_is_told_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"the report needs matplotlib: pip install 'xar_scale\[evaluate\]'"):
        build_page(run)


def test_the_template_and_its_style_are_installed_with_the_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["xar_scale.report"]
    files = [path for path in (ROOT / "xar_scale" / "report").iterdir() if path.is_file() and path.suffix != ".py"]
    assert len(files) == 2 and all(any(path.match(pattern) for pattern in patterns) for path in files)
