"""tools/inspect_checkpoint.py: output and exit codes for intact, damaged, non-finite and differing checkpoints."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import digits_config
from tests.processes import ROOT
from tests.unit.damage import edit, flip_byte
from tests.unit.foreign_checkpoints import reshard
from tests.unit.tiny_run import Run
from tools import inspect_checkpoint
from xar_scale.checkpoint.files import fingerprint, header_of
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import read_manifest
from xar_scale.cli import main as xar_scale
from xar_scale.data.order import Position
from xar_scale.ema import POWER_KINDS
from xar_scale.guard import GuardState

CONFIG = digits_config(
    "train.engine=single", "model.width=16", "model.heads=2", "train.global_batch=8", "optim.ema_snapshots_every=2"
)
WEIGHT = "model/in_proj.weight"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool on words: returns exit code, stdout and stderr."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect_checkpoint", *map(str, words)])
        capsys.readouterr()
        return inspect_checkpoint.main(), *capsys.readouterr()

    return run


def facts(shown: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in shown.splitlines())


def test_a_checkpoint_is_described(tmp_path, tool):
    run = Run(tmp_path, config=digits_config("train.engine=single"))
    run.train(2)
    guard = GuardState(lowered=True, held_until=9, holds=2, discarded=3, skipped=1, rollbacks=1)
    bad = [("b.tar", place) for place in range(10)]
    manifest = run.manifest(step=13, samples_consumed=104, position=Position(1, 4), guard=guard, bad_samples=bad)
    run.store.save(replace(manifest, quarantined=[("a.tar", 7)]))
    run.store.finish()
    code, shown, complaint = tool("show", path := run.store.newest)
    found = facts(shown)
    size = os.path.getsize(path / "shard-00001-model-00001-of-00001.safetensors") / 1e9
    assert (code, complaint) == (0, "")
    assert found == {
        "what": "found",
        "folder": str(path),
        "step": "13 of 700",
        "model": f"nano, {sum(p.numel() for p in run.engine.model.parameters()):,} parameters, entity cell",
        "kinds": "model, ema, exp_avg, exp_avg_sq",
        "written": f"by 1 ranks, engine single, {size:.3g} GB: shard-00001-model-00001-of-00001.safetensors ({size:.3g} GB)",
        "precision": "fp32, configured fp32",
        "guard": "lowered until step 9; holds 2, discarded 3, skipped 1, transients 0, quarantined 0, rollbacks 1",
        "data": "epoch 1, 4 samples into it; 104 in total",
        "bad samples": "10: " + ", ".join(f"{place} of b.tar" for place in range(8)) + " and 2 more",
        "quarantined": "1: 7 of a.tar",
        "files": "intact",
        "values": "finite",
    }


def test_a_run_is_shown_as_a_table_and_damage_exits_with_65_after_everything_is_shown(tmp_path, tool):
    run = Run(tmp_path, config=CONFIG, keep_last=9)
    paths = []
    for step in range(1, 6):
        run.train()
        spoilt = next(iter(run.engine.shards()))
        kept = spoilt.exp_avg.clone()
        if step == 4:
            spoilt.exp_avg[:3] = torch.tensor([float("nan"), 1.0, float("inf")])
        paths.append(run.save())
        spoilt.exp_avg.copy_(kept)
    run.store.save(run.manifest(step=4, kinds=tuple(POWER_KINDS)))
    run.store.finish()
    code, shown, complaint = tool("show", tmp_path)
    assert (code, complaint) == (65, f"inspect_checkpoint: {tmp_path}: 1 of 6 damaged or not finite\n")
    flip_byte(next(paths[0].glob("*.safetensors")))
    edit(paths[1] / "manifest.json", '"seed": 0', '"seed": 1')
    next(paths[2].glob("*.safetensors")).unlink()
    code, shown, complaint = tool("show", tmp_path)
    lines = shown.splitlines()
    words = [re.split(r"  +", line) for line in lines[1:7]]
    names = [f"checkpoints/step-0000000{step}" for step in range(1, 6)] + ["ema/step-00000004"]
    assert [row[0] for row in words] == names
    assert [row[1] for row in words] == ["1", "-", "3", "4", "5", "4"]
    assert [row[-2:] for row in words] == [
        ["DAMAGED", "finite"],
        ["DAMAGED", "unreadable"],
        ["DAMAGED", "unreadable"],
        ["intact", "NOT FINITE"],
        ["intact", "finite"],
        ["intact", "finite"],
    ]
    assert words[0][3:7] == ["width 16", "fp32", "single", "1"]
    shard = "shard-00001-model-00001-of-00001.safetensors"
    assert f"{names[0]}: DAMAGED: checkpoint {paths[0]}: {shard} is corrupt (size or checksum differs)" in lines
    assert f"{names[1]}: DAMAGED: checkpoint {paths[1]}: manifest.json is torn or changed" in lines
    assert f"{names[2]}: unreadable: {paths[2] / shard}: No such file or directory" in lines
    found = next(line for line in lines if line.startswith(f"{names[3]}: NOT FINITE"))
    assert found.startswith(f"{names[3]}: NOT FINITE: 2 elements in 1 vectors: exp_avg/{spoilt.name} (2 of ")
    assert (code, complaint) == (65, f"inspect_checkpoint: {tmp_path}: 4 of 6 damaged or not finite\n")
    code, shown, complaint = tool("show", paths[1])  # a single one is shown as far as possible
    assert code == 65 and "torn or changed" in shown and complaint.endswith("1 of 1 damaged or not finite\n")


@pytest.mark.parametrize("moment", ["verify", "not_finite"])
def test_a_checkpoint_that_a_run_drops_during_the_check_is_not_shown(tmp_path, tool, monkeypatch, moment):
    run = Run(tmp_path, config=CONFIG)
    run.train()
    first = run.save()
    run.train()
    run.save()
    exact = getattr(inspect_checkpoint, moment)

    def meanwhile(what):
        shutil.rmtree(first, ignore_errors=True)
        return exact(what)

    monkeypatch.setattr(inspect_checkpoint, moment, meanwhile)
    code, shown, _ = tool("show", tmp_path)
    assert code == 0 and len(shown.splitlines()) == 2 and first.name not in shown


def test_a_converted_checkpoint_is_shown_without_a_run(tmp_path, tool):
    Run(tmp_path / "run", config=CONFIG).save()
    assert reshard(tmp_path / "run", tmp_path / "universal", "--to", "universal") == 0
    made = tmp_path / "made"
    assert reshard(tmp_path / "universal", made, "--to", "xar-scale", "--files", "1") == 0
    code, shown, complaint = tool("show", made)
    assert (code, complaint) == (0, "")
    found = facts(shown)
    assert found["step"] == "0; run unknown: converted from another format"
    assert found["model"] == "24,884 parameters" and found["values"] == "finite" and "engine" not in found["written"]
    (tmp_path / "imported" / "checkpoints").mkdir(parents=True)
    made.rename(tmp_path / "imported" / "checkpoints" / "step-00000000")
    code, shown, _ = tool("show", tmp_path / "imported")
    assert code == 0 and re.split("  +", shown.splitlines()[1])[3] == "unknown"


def test_diff_of_a_run_takes_its_newest_checkpoint(tmp_path, tool):
    run = Run(tmp_path, config=CONFIG)
    for _ in range(2):
        run.train()
        first = run.save()
    code, shown, _ = tool("diff", tmp_path, first)
    assert (code, shown.splitlines()[0]) == (0, "manifest: identical")


def test_wrong_paths_end_with_64(tmp_path, tool):
    assert tool("show", tmp_path / "nowhere")[0] == 64
    (tmp_path / "checkpoints").mkdir()
    assert tool("show", tmp_path) == (64, "", f"inspect_checkpoint: no xar-scale checkpoint in {tmp_path}\n")
    assert tool("diff", tmp_path / "nowhere", tmp_path)[0] == 64
    assert tool("show")[0] == 64


def test_differences_are_listed_with_their_size(tmp_path, tool):
    run = Run(tmp_path / "one", config=CONFIG)
    run.train(2)
    run.ema.averages["ema"][1][0] = float("inf")  # in both checkpoints
    one = run.save()
    weight = next(shard.master for shard in run.engine.shards() if shard.name == "in_proj.weight")
    before = weight.clone()
    weight[1] += 0.5
    weight[3] -= 0.25
    weight[5] = 0.0
    run.ema.averages["ema"][0][2] = float("nan")
    run.ema.averages["ema"][1][1] += 1
    run.store.run = tmp_path / "two"
    run.store.folder = tmp_path / "two" / "checkpoints"
    changed = run.manifest(step=7)
    changed.config["optim"]["lr"] = 0.25
    run.store.save(changed)
    run.store.finish()
    two = run.store.newest
    code, shown, _ = tool("diff", one, two)
    lines = shown.splitlines()
    assert code == 0
    assert lines[:3] == ["manifest: 2 entries differ", "  step: 2 -> 7", "  config.optim.lr: 0.003 -> 0.25"]
    vectors = len(run.engine.shapes)
    assert f"model: 1 of {vectors} vectors differ" in lines and f"ema: 2 of {vectors} vectors differ" in lines
    for kind in ("ema-0.05", "ema-0.10", "exp_avg", "exp_avg_sq"):
        assert f"{kind}: identical" in lines
    row = next(re.split(r"  +", line.strip()) for line in lines if line.startswith(f"  {WEIGHT} "))
    gap = (weight - before).double()
    largest, relative = gap.abs().max().item(), (gap.norm() / before.double().norm()).item()
    assert row == [WEIGHT, f"{largest:.3g}", f"{relative:.3g}", f"3 of {weight.numel()}"]
    spoilt, infinite = (re.split(r"  +", line.strip()) for line in lines if line.startswith("  ema/"))
    assert spoilt[1:3] == ["nan", "nan"] and spoilt[3].startswith("1 of ")
    assert infinite[1] == "1" and infinite[3].startswith("1 of ")
    code, shown, _ = tool("diff", two, two)
    assert (code, shown.splitlines()[0]) == (0, "manifest: identical") and "differ" not in shown  # NaN equals itself, too


def test_vectors_that_only_one_checkpoint_holds_are_listed(tmp_path, tool):
    off = replace(CONFIG, optim=replace(CONFIG.optim, ema_snapshots_every=None))
    one, two = Run(tmp_path / "one", config=CONFIG).save(), Run(tmp_path / "two", config=off).save()
    code, shown, _ = tool("diff", one, two)
    assert code == 0 and "model: identical" in shown
    assert f"  only in {one}: ema-0.05/in_proj.weight, 64 elements\n" in shown and f"only in {two}" not in shown
    wider = Run(tmp_path / "wide", config=digits_config("train.engine=single", "model.width=32", "model.heads=2")).save()
    _, shown, _ = tool("diff", two, wider)
    assert f"  only in {two}: {WEIGHT}, 64 elements\n" in shown
    assert f"  only in {wider}: {WEIGHT}, 128 elements\n" in shown and "shapes.in_proj.weight: [16, 4] -> [32, 4]" in shown
    assert f"\n  {WEIGHT} " not in shown  # vectors of different sizes are not compared
    torn = next(two.glob("*.safetensors"))
    os.truncate(torn, size := torn.stat().st_size - 4)
    code, _, complaint = tool("diff", one, two)
    assert code == 65 and f"{torn} has {size} bytes" in complaint and "it is truncated" in complaint
    os.truncate(torn, 500)  # not even the header is complete
    code, _, complaint = tool("diff", one, two)
    assert code == 65 and f"{torn} is not a file of flat float32 vectors" in complaint


def test_a_post_hoc_ema_is_made_shown_and_sampled(tmp_path, tool, capsys):
    run = Run(tmp_path / "run", config=CONFIG)
    for _ in range(4):
        run.train(2)
        run.store.save(run.manifest(kinds=tuple(POWER_KINDS)), run.manifest())
        run.store.finish()
    made = tmp_path / "made"
    code, shown, _ = tool("ema", tmp_path / "run", "--std", "0.07", "--out", made)
    assert code == 0 and re.fullmatch(
        rf"{made}: EMA of sigma_rel 0.07 at step 8, from 4 snapshots; profile error \d\.\d\d%\n", shown
    )
    code, shown, _ = tool("show", made)
    assert code == 0 and facts(shown)["EMA"] == "sigma_rel 0.07, made from snapshots" and facts(shown)["kinds"] == "ema"
    images = ["sample", str(made), "--classes", "3", "--seeds", "0,1", "--out", str(tmp_path / "grid.npz"), "sample.steps=1"]
    assert xar_scale(images) == 0
    with np.load(tmp_path / "grid.npz") as archive:
        assert archive["arr_0"].shape == (2, 8, 8, 3)
    assert tool("ema", tmp_path / "run", "--std", "0.07", "--out", made)[0] == 64
    code, _, complaint = tool("ema", tmp_path / "run", "--std", "0.01", "--out", tmp_path / "short")
    assert code == 64 and "--std 0.01 cannot be made from 4 snapshots" in complaint and not (tmp_path / "short").exists()
    assert tool("ema", tmp_path / "run", "--std", "0.07", "--step", "4", "--out", tmp_path / "earlier")[0] == 0
    assert read_manifest(tmp_path / "earlier").manifest.step == 4
    assert not torch.equal(*(load_weights(read_manifest(tmp_path / at), "ema")["in_proj.weight"] for at in ("made", "earlier")))


def test_snapshots_from_before_the_first_update_are_not_averaged(tmp_path, tool):
    """All steps up to them were skipped: their EMA is of the initial weights alone."""
    run = Run(tmp_path / "run", config=CONFIG)
    for step, skipped in ((2, 2), (4, 2), (6, 2)):
        run.train(2)
        run.store.save(run.manifest(kinds=tuple(POWER_KINDS), guard=GuardState(skipped=skipped)))
        run.store.finish()
        code, shown, complaint = tool("ema", tmp_path / "run", "--std", "0.1", "--out", tmp_path / f"made-{step}")
        if step == skipped:
            said = f"no snapshot in {tmp_path}/run/ema has any update up to step 2: all steps were skipped"
            assert (code, complaint) == (64, f"inspect_checkpoint: {said}\n")
        else:
            assert code == 0 and f"from {step // 2 - 1} snapshots" in shown, complaint


def test_a_file_that_a_full_disk_does_not_take_is_named(tmp_path, tool, largest_file):
    run = Run(tmp_path / "run", config=CONFIG)
    for _ in range(2):
        run.train(2)
        run.store.save(run.manifest(kinds=tuple(POWER_KINDS)), run.manifest())
        run.store.finish()
    largest_file(10_000)
    code, _, complaint = tool("ema", tmp_path / "run", "--std", "0.09", "--out", tmp_path / "made")
    assert (code, complaint.partition("shard")[0]) == (74, f"inspect_checkpoint: {tmp_path}/.made.tmp/"), complaint
    assert complaint.endswith(".safetensors: File too large\n")


def sparse_checkpoint(like: Path, path: Path, elements: int, kinds: tuple[str, ...]) -> None:
    """One vector per kind, of zeros that take no space on disk."""
    path.mkdir(parents=True)
    name = "shard-00001-model-00001-of-00001.safetensors"
    header = header_of({f"{kind}/w": (0, elements) for kind in kinds})
    (path / name).write_bytes(header)
    os.truncate(path / name, len(header) + 4 * elements * len(kinds))
    manifest = read_manifest(like).manifest
    files = {name: fingerprint(path / name)}
    (path / "manifest.json").write_bytes(replace(manifest, kinds=kinds, shapes={"w": [elements]}, files=files).to_json())


def test_memory_stays_flat_whatever_the_size(tmp_path):
    """With 134 MB in a vector the commands take less than 64 MB more than with 4 kB."""
    run = Run(tmp_path / "like", config=CONFIG)
    run.train()
    like = run.save()
    peaks = []
    for elements in (1000, 1 << 25):
        run = tmp_path / str(elements)
        one, two = (run / "ema" / f"step-0000000{step}" for step in (1, 2))
        for path in (one, two):
            sparse_checkpoint(like, path, elements, tuple(POWER_KINDS))
        commands = [["show", one], ["diff", one, two], ["ema", run, "--std", "0.05", "--out", run / "made"]]
        peaks.append(peak([list(map(str, words)) for words in commands]))
    assert peaks[1] - peaks[0] < 64_000, peaks


def peak(commands: list[list[str]]) -> int:
    """Peak memory in KB of one process that runs the commands one after another."""
    program = (
        "import json, resource, sys; from tools import inspect_checkpoint\n"
        "for words in json.loads(sys.argv.pop()):\n"
        "    sys.argv[1:] = words\n"
        "    assert inspect_checkpoint.main() == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    words = [sys.executable, "-c", program, json.dumps(commands)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
