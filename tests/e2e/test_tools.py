"""Operators' programs, run as typed."""

import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import kl16_shapes
from tests.processes import command, launch
from tests.unit.tiny_run import Run
from tools import bench, cache_latents, sweep
from xar_scale.data.reader import LatentShards
from xar_scale.evaluate.digits import cache_digits
from xar_scale.evaluate.evaluation import image_set
from xar_scale.evaluate.generate import open_generator
from xar_scale.evaluate.trained import open_trained
from xar_scale.model.entities import kinds


@pytest.mark.long
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


SETS = ["euler-1-1.5", "euler-3-1.5", "heun-1-1.5", "heun-3-1.5"]


def rows_of(table: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in table.splitlines() if "---" not in line]


def without_speed(rows: list[list[str]]) -> list[list[str]]:
    return [[*row[:4], *row[5:]] for row in rows]


@pytest.mark.long
def test_a_sweep_resumes_and_is_the_same_on_two_ranks(tmp_path):
    run = Run(tmp_path / "run")
    run.train(5)
    run.save()
    one, two, guided = tmp_path / "one", tmp_path / "two", "sample.guidance=1.5"

    def words(out, images=300):
        lists = ["--sampler", "euler,heun", "--steps", "1,3", "--images", str(images)]
        return ["tools/sweep.py", str(tmp_path / "run"), guided, "--out", str(out), "--reference", "digits", *lists]

    done = command(sys.executable, *words(one))
    assert done.returncode == 0, done.stdout + done.stderr
    table = (one / "sweep.md").read_text()
    assert done.stdout.endswith(table)
    assert done.stdout.count("sampling on 1 x cpu") == 1 and done.stdout.count("0 already done") == 4
    titles, *rows = rows_of(table)
    assert titles[:6] == ["sampler", "steps", "guidance", "passes per image", "images/s", "frechet_distance"]
    assert titles[6:] == ["precision", "recall", "read_as_class"]
    wanted = [["euler", "1", "1.5", "8"], ["euler", "3", "1.5", "24"], ["heun", "1", "1.5", "8"], ["heun", "3", "1.5", "40"]]
    assert [row[:4] for row in rows] == wanted and all(float(row[4]) > 0 for row in rows)
    assert rows[0][5:] == rows[2][5:]  # one step is Euler's
    distances = [float(row[5].strip("*")) for row in rows]
    assert [row[5].startswith("**") for row in rows] == [distance == min(distances) for distance in distances]
    results = json.loads((one / "sweep.json").read_text())
    assert list(results) == SETS
    for name, result in results.items():
        assert json.loads((one / name / "evaluation.json").read_text()) == result and result["set"]["images"] == 300
        assert np.load(one / name / "row.npy").shape == (10, 1, 8, 8) and not [*(one / name).glob("part-*")]
    assert "<svg" in (one / "sweep.svg").read_text()
    with Image.open(one / "samples.png") as sheet:
        assert sheet.height == 4 * 52 + 4

    again = command(sys.executable, *words(one))
    assert again.returncode == 0 and again.stdout == table  # and nothing is generated

    # one half-finished set, and one that was compared with something else
    (one / SETS[1] / "evaluation.json").unlink()
    half = open_trained(tmp_path / "run", [guided, "sample.sampler=euler", "sample.steps=3"])
    images = image_set(half, one / SETS[1], 300, 0)
    images.draw(open_generator(half, torch.device("cpu")))
    images.path(1).unlink()
    results[SETS[3]]["reference"]["path"] = "other"
    (one / SETS[3] / "evaluation.json").write_text(json.dumps(results[SETS[3]]))
    (one / "samples.png").rename(one / "first.png")
    resumed = command(sys.executable, *words(one))
    assert resumed.returncode == 0, resumed.stderr
    assert [line.split(", ")[1] for line in resumed.stdout.splitlines() if "already done" in line] == [
        "1 already done",
        "0 already done",
    ]
    _, *now = rows_of((one / "sweep.md").read_text())
    assert without_speed(now) == without_speed(rows) and now[0] == rows[0] and now[2] == rows[2]
    assert now[1][4] == "" and float(now[3][4]) > 0  # only sets generated in one go are timed
    assert (one / "samples.png").read_bytes() == (one / "first.png").read_bytes() and not [*one.glob("*/part-*")]

    ended = launch(2, words(two), tmp_path / "logs")
    assert ended.codes == [0, 0], ended.text
    assert without_speed(rows_of((two / "sweep.md").read_text())) == without_speed([titles, *rows])

    other = command(sys.executable, *words(one, images=200))
    assert other.returncode == 64
    assert other.stderr.startswith(f"sweep: {one / SETS[0]} holds a different set: images is 300 there")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "5,x"], "argument --steps: '5,x' is not a comma-separated list of numbers of at least 1"),
        (["--steps", "0,5"], "argument --steps: '0,5' is not a comma-separated list of numbers of at least 1"),
        (["--guidance", "1,nan"], "argument --guidance: '1,nan' is not a comma-separated list of numbers of at least 0"),
        (["--guidance", ""], "argument --guidance: '' is not a comma-separated list of numbers of at least 0"),
        (["--sampler", "euler,rk4"], "no sampler 'rk4'; available: euler, euler_maruyama, heun, adams_bashforth"),
        (["--images", "1"], "--images is at least 2"),
        (["train.steps=3"], "train.steps=3: only sample.* and kernels.* can be changed"),
        (["sample.steps=3"], "no checkpoint at nowhere"),
    ],
)
def test_invalid_sweeps_are_refused(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", "nowhere", "--out", "x", "--reference", "digits", *words])
    assert sweep.main() == 64
    error = capsys.readouterr().err
    assert error.startswith("sweep: ") and said in error and error.count("\n") == 1


def test_a_sweep_needs_matplotlib_before_it_samples(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["sweep", "nowhere", "--out", "x", "--reference", "digits"])
    assert sweep.main() == 64
    assert capsys.readouterr().err == "sweep: the plot needs matplotlib: pip install 'xar_scale[evaluate]'\n"


@pytest.mark.long
def test_attention_and_recomputation_are_timed():
    small = ["--model", "nano", "--grid", "4", "--batch", "1", "--precision", "bf16"]
    done = command(sys.executable, "tools/bench.py", "attention", *small)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    entities = zip(kinds(), ["16", "4", "4", "3", "1"], strict=True)
    assert [row[:2] for row in rows] == [list(entity) for entity in entities for _ in range(5)]
    assert [row[2].split()[0] for row in rows] == ["dense", "masked", "prefix", "flex", "flash"] * len(kinds())
    assert sum(row[2].endswith(", chosen") for row in rows) == len(kinds())
    for row in rows:
        backend = row[2].split()[0]
        assert "needs" in row[3] if backend == "flash" else float(row[3]) > 0
        reason = {"flash": "needs", "flex": "no backward pass"}.get(backend)
        assert reason in row[4] if reason else float(row[4]) > 0
    done = command(sys.executable, "tools/bench.py", "attention", *small, "--entity", "scale")
    assert done.stdout.count("| scale | 3 |") == 5 and "| cell |" not in done.stdout
    done = command(sys.executable, "tools/bench.py", "recompute", "--model", "nano", "--grid", "8", "--batch", "16")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["none", "full", "selective", "offload"] and all(float(row[1]) > 0 for row in rows)
    peaks = {row[0]: float(row[2]) for row in rows}
    assert 0 < peaks["full"] < peaks["none"]
    wrong = command(sys.executable, "tools/bench.py", "recompute", "--model", "nosuch")
    assert wrong.returncode == 64 and "mode none exited with code 64: bench: no model 'nosuch'" in wrong.stderr


def test_the_orders_are_drawn(tmp_path):
    done = command(sys.executable, "tools/draw_entities.py", "--out", str(tmp_path / "orders.png"), "--grid", "4")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "orders.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(10_000)}
    assert len(colours) > 10
    wrong = command(sys.executable, "tools/draw_entities.py", "--out", str(tmp_path / "orders.png"), "--grid", "0")
    assert wrong.returncode == 78 and wrong.stderr.startswith("draw_entities: grid.0 = 0")


@pytest.mark.parametrize("words", [[], ["nosuch", "--out", "x"], ["digits", "--out", "x", "--samples-per-shard", "0"]])
def test_wrong_words_end_in_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cache_latents", *words])
    assert cache_latents.main() == 64
    said = capsys.readouterr().err
    assert said.startswith("cache_latents: ") and said.count("\n") == 1


def test_one_rank_of_many_is_built():
    done = command(sys.executable, "tools/bench.py", "build", "--model", "xar_b", "--ranks", "8")
    assert done.returncode == 0, done.stderr
    weights, grown, ready = done.stdout.splitlines()[-3:]
    assert weights == "xar_b: 0.69 GB of float32 weights, one rank of 8 keeps 0.09 GB"
    assert 0.08 < float(grown.split()[4]) < 0.5 and ready.endswith(" s until the engine was ready")


def tool(name, *words):
    return command(sys.executable, f"tools/{name}.py", *map(str, words))


def test_tars_get_the_index_they_had_and_damage_is_named(tmp_path):
    data, bare = tmp_path / "data", tmp_path / "bare"
    cache_digits(data, samples_per_shard=500)
    bare.mkdir()
    for tar in data.glob("*.tar"):
        shutil.copy(tar, bare)
    tokenizer = '{"name": "pixel", "patch": 2, "image_channels": 1}'
    words = [bare, "--stored", "latents", "--latent-scale", "1", "--classes", "10", "--tokenizer", tokenizer]
    indexed = tool("index_shards", *words)
    assert indexed.returncode == 0, indexed.stderr
    assert indexed.stdout == f"1,797 samples in 4 shards, float16(4, 4, 4): {bare}\n"
    for path in data.iterdir():
        assert (bare / path.name).read_bytes() == path.read_bytes(), path.name
    again = tool("index_shards", *words)
    assert again.returncode == 64 and "to index its tars again, remove dataset.json and *.index.json" in again.stderr

    well = tool("verify_shards", bare)
    assert well.returncode == 0, well.stderr
    assert well.stdout == f"{bare}: 1,797 samples in 4 shards, every byte as written, every value finite\n"
    content = bytearray((bare / "digits-000001.tar").read_bytes())
    content[1536 + 140] ^= 1  # the first array's
    (bare / "digits-000001.tar").write_bytes(content)
    (bare / "digits-000002.tar").unlink()
    bad = tool("verify_shards", bare, "--processes", 2)
    assert bad.returncode == 65
    assert bad.stdout.splitlines() == [
        f"shard {bare}/digits-000001.tar, sample 000500 (number 0): checksum does not match",
        f"shard {bare}/digits-000002.tar is missing",
    ]
    assert bad.stderr == f"verify_shards: {bare}: 2 faults in 2 of 4 shards\n"


def test_mars_cache_becomes_shards(tmp_path):
    moments = np.random.default_rng(0).standard_normal((6, 2, 32, 4, 4), dtype=np.float32)
    for number, (latent, flipped) in enumerate(moments):
        folder = tmp_path / "cache" / f"n{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"image{number}.JPEG.npz", moments=latent, moments_flip=flipped)
    weights = tmp_path / "kl16.ckpt"
    words = ["import_mar_cache", tmp_path / "cache", "--out", tmp_path / "set", "--weights", weights, "--samples-per-shard", 4]
    weights.write_bytes(b"weights")
    wrong = tool(*words)
    assert wrong.returncode == 65 and wrong.stderr.startswith(f"import_mar_cache: {weights} is not a plain weights file: ")
    assert not (tmp_path / "set").exists()
    torch.save({"model": {name: torch.zeros(1).expand(shape) for name, shape in kl16_shapes().items()}}, weights)
    done = tool(*words)
    assert done.returncode == 0, done.stderr
    shards = LatentShards(tmp_path / "set")
    assert done.stdout == f"6 samples in 2 shards: {tmp_path / 'set'}\n" and shards.info.classes == 2
    assert shards.info.tokenizer == {"name": "kl16", "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    for at in range(6):
        sample = shards.read(*divmod(at, 4))
        number = int(sample.key[-1])
        assert sample.key == f"n{number % 2}-image{number}" and sample.label == number % 2
        assert np.array_equal(sample.latent, moments[number, 0].astype(np.float16))
        assert np.array_equal(sample.flipped, moments[number, 1].astype(np.float16))
    absent = tool("import_mar_cache", tmp_path / "absent", "--out", tmp_path / "other", "--weights", weights)
    assert absent.returncode == 64 and f"no folder at {tmp_path / 'absent'}" in absent.stderr


def test_reading_and_the_order_are_timed(tmp_path):
    done = tool("bench", "loader", "--data", tmp_path, "--samples", 128)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["MAR's folder of .npz", "stock webdataset", "ours"]
    assert all(int(row[1].replace(",", "")) > 0 for row in rows) and rows[0][2] == "1.0"
    done = tool("bench", "order", "--shards", 1000, "--samples-per-shard", 10)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10,000 samples in 1,000 shards, 128 lanes; one process\n")


def table_of(output: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")][2:]
    return {row[0]: row[1:] for row in rows}


def test_what_the_guard_adds_to_a_step_is_the_sum_of_its_parts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "guard", "--model", "nano", "--grid", "4", "--batch", "1"])
    assert bench.main() == 0
    said = capsys.readouterr().out
    assert said.startswith("nano, 4x4 tokens, batch 1, fp32, cpu; attention ")  # the kernels that training would use
    rows = table_of(said)
    (step,), (guard, share) = rows.pop("the step"), rows.pop("the guard")
    assert len(rows) == 5 and float(guard) == pytest.approx(sum(float(row[0]) for row in rows.values()), abs=0.004)
    assert 0 < float(guard) / float(step) == pytest.approx(float(share.rstrip("%")) / 100, rel=0.05)


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp2", 8)])
def test_a_pass_s_launches_are_timed_a_block(tmp_path, engine, ranks):
    ended = launch(1, ["tools/bench.py", "launches", "--model", "nano", "--engine", engine], tmp_path)
    assert ended.codes == [0], ended.text
    said = rf"nano's 4 blocks, fp32, {engine}, rank 0 of {ranks} on cpu: (.*) ms per micro-batch, (.*) per block\n"
    whole, block = map(float, re.fullmatch(said, ended.outputs[0]).groups())
    assert 0 < block == pytest.approx(whole / 4, abs=0.02)


@pytest.mark.long
def test_a_step_of_two_ranks_is_predicted_and_measured(tmp_path):
    ended = launch(2, ["tools/bench.py", "scaling", "--model", "nano", "--engine", "fsdp2"], tmp_path)
    assert ended.codes == [0, 0], ended.text
    rows = table_of(ended.outputs[0])
    assert list(rows) == ["one rank alone x ranks / cores", "all ranks at once"]
    for row in rows.values():
        *parts, predicted, measured = map(int, row[:5])
        assert min(*parts, measured) > 0 and abs(sum(parts) - predicted) <= 2  # each is rounded
        assert row[5].endswith("%")


@pytest.mark.long
def test_keeping_a_state_is_timed_beside_deepspeeds_way_in_a_folder_that_was_not_there(tmp_path):
    words = ["bench", "checkpoint", "--model", "nano", "--data", tmp_path / "made"]
    done = tool(*words)
    assert done.returncode == 0, done.stderr
    rows = table_of(done.stdout)
    assert list(rows) == ["ours", "DeepSpeed, universal"] and not (tmp_path / "made").exists()
    for row in rows.values():
        _, saved, _, loaded, read, size = map(float, row)
        assert min(saved, loaded, read, size) > 0
    assert float(rows["ours"][2]) == 0 < float(rows["DeepSpeed, universal"][2])  # only theirs is converted
    (tmp_path / "made").mkdir()
    refused = tool(*words)
    assert refused.returncode == 78 and f"{tmp_path / 'made'} exists" in refused.stderr and (tmp_path / "made").is_dir()
