"""The report of a run: what is read from its folder, and the page."""

import base64
import io
import json
import os
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.processes import ROOT
from tests.unit.guarded_run import Guarded
from tests.unit.run_folder import CALM, STEPS, draw_samples, logged, text_of, write_run
from tests.unit.tiny_run import Run
from xar_scale.cli import main
from xar_scale.errors import ConfigError, UsageError
from xar_scale.guard import GuardState
from xar_scale.metrics import read_log
from xar_scale.report import artifacts, incidents
from xar_scale.report.page import build_page
from xar_scale.report.read import read_run
from xar_scale.watchdog import RankState


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
