"""Operators' programs, run as typed."""

import sys

import pytest
from PIL import Image

from tests.e2e.test_demo import command
from xar_scale.model.entities import kinds


@pytest.mark.timeout(300)
def test_kinds_of_entity_are_compared_and_finished_runs_kept(tmp_path):
    small = ["train.steps=2", "optim.warmup_steps=1", "train.global_batch=16", "train.log_every=1", "data.workers=0"]
    words = [sys.executable, "tools/compare_entities.py", "--out", str(tmp_path), *small, "sample.steps=1"]
    first = command(*words)
    assert first.returncode == 0, first.stdout + first.stderr
    table = (tmp_path / "table.md").read_text()
    assert first.stdout.endswith(table)
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == kinds()
    assert [row[1:3] for row in rows] == [["16", "16"], ["4", "16"], ["4", "16"], ["3", "21"], ["1", "16"]]  # K, T
    assert all(float(row[3]) > 0 and row[4].endswith("%") and int(row[5]) > 0 for row in rows)
    with Image.open(tmp_path / "entities.png") as sheet:
        assert sheet.height == 5 * 52 + 4
    again = command(*words)
    assert again.returncode == 0 and "step 1/2" not in again.stdout

    words = [sys.executable, "tools/compare_samplers.py", str(tmp_path / "cell"), "--out", str(tmp_path)]
    done = command(*words, "--steps", "1,3", "--per-class", "2")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert [row[:3] for row in rows if row[0] in ("heun", "euler")] == [
        ["euler", "1", "1"],
        ["euler", "3", "3"],
        ["heun", "1", "1"],
        ["heun", "3", "5"],
    ]
    assert all(row[3].endswith("%") and float(row[4]) > 0 for row in rows)
    assert {len(row) for row in rows if row[0] == "euler_maruyama"} == {5}  # it converges to no one image
    off = {(row[0], row[1]): float(row[5]) for row in rows if row[0] != "euler_maruyama"}
    assert off["euler", "1"] == off["heun", "1"] == off["adams_bashforth", "1"]  # one step is Euler's
    assert 0 < off["heun", "3"] < off["adams_bashforth", "3"] < off["euler", "3"] < off["euler", "1"]
    with Image.open(tmp_path / "samplers.png") as sheet:
        assert sheet.height == 8 * 52 + 4
    wrong = command(*words, "--steps", "1,x")
    assert wrong.returncode == 64 and "--steps '1,x' is not numbers with commas" in wrong.stderr
    for none in (["--steps", "0"], ["--per-class", "0"]):
        wrong = command(*words, *none)
        assert wrong.returncode == 64 and "--steps and --per-class are at least 1" in wrong.stderr


@pytest.mark.timeout(300)
def test_attention_and_recomputation_are_timed():
    small = ["--model", "nano", "--grid", "4", "--batch", "1"]
    done = command(sys.executable, "tools/bench.py", "attention", *small)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    entities = zip(kinds(), ["16", "4", "4", "3", "1"], strict=True)
    assert [row[:2] for row in rows] == [list(entity) for entity in entities for _ in range(3)]
    assert [row[2].split()[0] for row in rows] == ["dense", "prefix", "flex"] * len(kinds())
    assert sum(row[2].endswith(", chosen") for row in rows) == len(kinds())
    for row in rows:
        assert float(row[3]) > 0
        assert "no backward pass" in row[4] if row[2].startswith("flex") else float(row[4]) > 0
    done = command(sys.executable, "tools/bench.py", "attention", *small, "--entity", "scale")
    assert done.stdout.count("| scale | 3 |") == 3 and "| cell |" not in done.stdout
    done = command(sys.executable, "tools/bench.py", "recompute", "--model", "nano", "--grid", "8", "--batch", "16")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["none", "full", "selective", "offload"] and all(float(row[1]) > 0 for row in rows)
    peaks = {row[0]: float(row[2]) for row in rows}
    assert 0 < peaks["full"] < peaks["none"]
    wrong = command(sys.executable, "tools/bench.py", "recompute", "--model", "nosuch")
    assert wrong.returncode == 64 and "mode none ended with code 64: bench: no model 'nosuch'" in wrong.stderr


def test_the_orders_are_drawn(tmp_path):
    done = command(sys.executable, "tools/draw_entities.py", "--out", str(tmp_path / "orders.png"), "--grid", "4")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "orders.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(10_000)}
    assert len(colours) > 10
    wrong = command(sys.executable, "tools/draw_entities.py", "--out", str(tmp_path / "orders.png"), "--grid", "0")
    assert wrong.returncode == 78 and wrong.stderr.startswith("draw_entities: grid.0 = 0")


@pytest.mark.parametrize("words", [[], ["nosuch", "--out", "x"], ["digits", "--out", "x", "--samples-per-shard", "0"]])
def test_wrong_words_end_in_one_line(words, tmp_path):
    done = command(sys.executable, "tools/cache_latents.py", *words)
    assert done.returncode == 64
    assert done.stderr.startswith("cache_latents: ") and done.stderr.count("\n") == 1


@pytest.mark.timeout(300)
def test_one_rank_of_many_is_built():
    done = command(sys.executable, "tools/bench.py", "build", "--model", "xar_b", "--ranks", "8")
    assert done.returncode == 0, done.stderr
    weights, grown, ready = done.stdout.splitlines()[-3:]
    assert weights == "xar_b: 0.69 GB of float32 weights, one rank of 8 keeps 0.09 GB"
    assert 0.08 < float(grown.split()[4]) < 0.5 and ready.endswith(" s until the engine was ready")
