"""A report of a run whose files are damaged: what can be read is shown, and what cannot is named."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.processes import ROOT
from tests.unit.guarded_run import NAN
from tests.unit.run_folder import STEPS, logged, text_of, write_run
from tests.unit.tiny_run import Run
from xar_scale.checkpoint import manifest
from xar_scale.cli import main
from xar_scale.report.page import build_page
from xar_scale.watchdog import RankState

HUGE = pytest.param(10**4000, id="10**4000")


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


@pytest.mark.parametrize("value", ["x", [1], {}, None, True, NAN, math.inf, -math.inf, HUGE, 1e308, -1e308, -5, 0])
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


@pytest.mark.parametrize("value", ["x", [1], {}, None, NAN, math.inf, HUGE, 1e300, -5, "\ud800"])
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
