"""The command line: one error line and a documented exit code for every wrong request."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from tests.unit.conftest import assert_ends
from tests.unit.tiny_run import INFO, Run
from xar_scale import files, program
from xar_scale.checkpoint.manifest import newest_valid
from xar_scale.cli import main
from xar_scale.engines import replicated
from xar_scale.engines.single import SingleEngine
from xar_scale.errors import ProcessError, UsageError
from xar_scale.evaluate.digits import cache_digits
from xar_scale.metrics import read_log
from xar_scale.model import recompute
from xar_scale.program import exit_code_of

FAST = ["sample.steps=1", "sample.sampler=euler", "sample.guidance=1.0"]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.save()
    return str(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 64, "COMMAND"),
        (["nosuch"], 64, "nosuch"),
        (["train"], 64, "needs --recipe or --config"),
        (["train", "--recipe", "nosuch"], 64, "no recipe 'nosuch'; available: digits, imagenet256_b"),
        (["train", "--recipe", "digits", "--nosuch", "1"], 64, "--nosuch"),
        (["train", "--recipe", "digits", "nonsense"], 64, "nonsense"),
        (["train", "--rec", "digits"], 64, "--rec"),  # no abbreviations
        (["train", "--config", "nowhere.yaml"], 64, "nowhere.yaml"),
        (["train", "--recipe", "digits", "optim.lr=nan-ish"], 78, "optim.lr = 'nan-ish'"),
        (["train", "--recipe", "imagenet256_b", "train.engine=single"], 78, "data.path is not set"),
        (["sample", "nowhere", "--out", "x.png"], 64, "no checkpoint at nowhere"),
        (["evaluate", "nowhere.npz", "--reference", "digits", "--out", "x"], 64, "no images at nowhere.npz"),
        (["evaluate", "nowhere", "--reference", "digits", "--out", "x"], 64, "no checkpoint at nowhere"),
        (["evaluate", "nowhere", "--reference", "digits"], 64, "nowhere is not a run: give --out, a folder for the metrics"),
        (["evaluate", "nowhere", "--out", "x"], 64, "arguments are required: --reference"),
        (["evaluate", "x", "--reference", "digits", "--out", "x", "--images", "1"], 64, "--images must be at least 2"),
        (["sample", "--out", "x.png", "sample.steps=3", "nowhere", "--seeds", "1"], 64, "no checkpoint at nowhere"),
        (["evaluate", "train.steps=1", "--out", "x"], 64, "arguments are required: what"),
    ],
)
def test_wrong_arguments(capsys, arguments, code, part):
    assert_ends(capsys, arguments, code, part)


def test_print_config_prints_and_trains_nothing(capsys, tmp_path):
    arguments = [
        "train",
        "optim.lr=1e-4",
        "--recipe",
        "digits",
        "--run-dir",
        tmp_path / "run",
        "--print-config",
        "train.seed=3",
    ]
    assert main([str(word) for word in arguments]) == 0
    printed = capsys.readouterr().out
    assert "lr: 0.0001" in printed and "seed: 3" in printed
    assert not (tmp_path / "run").exists()


def test_the_local_rank_that_deepspeed_passes_is_accepted(capsys):
    assert main(["--local_rank=0", "train", "--recipe", "digits", "--print-config"]) == 0


def test_samples_of_chosen_classes(capsys, run, tmp_path):
    out = [tmp_path / "new" / name for name in ("grid.png", "all.npz", "view.gif", "single")]
    words = [word for path in out for word in ("--out", str(path))]
    assert main(["sample", run, "--classes", "3,7", "--seeds", "5,9", *words, *FAST]) == 0
    assert "4 images of" in capsys.readouterr().out
    with np.load(out[1]) as archive:
        assert archive["arr_1"].tolist() == [3, 7, 3, 7]
        images = archive["arr_0"].astype(int)
    assert out[0].exists() and out[2].exists() and len([*out[3].iterdir()]) == 4
    assert main(["sample", run, "--classes", "7", "--seeds", "9", "--out", str(out[1]), *FAST]) == 0
    with np.load(out[1]) as archive:
        assert np.abs(archive["arr_0"][0].astype(int) - images[3]).max() <= 1  # class and seed determine the image


def test_a_run_is_evaluated_in_its_own_folder_and_an_npz_elsewhere(capsys, run, tmp_path):
    words = ["--reference", "digits", "--images", "30"]
    assert main(["evaluate", run, *words, *FAST]) == 0
    folder = Path(run) / "evaluations" / "step-00000000"
    result = json.loads((folder / "digits" / "evaluation.json").read_text())
    said = capsys.readouterr().out
    assert f"frechet_distance                 {result['metrics']['frechet_distance']:.4f}" in said and str(folder) in said
    assert result["set"]["images"] == 30 and result["set"]["sample"]["steps"] == 1 and result["weights"]["step"] == 0
    assert result["features"]["name"] == "digits-svm" and "torch-fidelity" in result["versions"]
    assert "these are not FID or IS" in (folder / "digits" / "evaluation.md").read_text()
    assert_ends(capsys, ["evaluate", run, *words], 64, "holds a different set: sample is", "choose another --out")
    assert_ends(capsys, ["evaluate", run, *words, "train.steps=2"], 64, "train.steps=2: only sample.* and kernels.*")

    every = np.concatenate([np.load(path) for path in sorted(folder.glob("part-*.npy"))])
    np.savez(tmp_path / "x.npz", arr_0=every.transpose(0, 2, 3, 1), arr_1=np.arange(30) % 10)
    assert main(["evaluate", str(tmp_path / "x.npz"), *words[:2], "--out", str(tmp_path / "of_npz")]) == 0
    again = json.loads((tmp_path / "of_npz" / "digits" / "evaluation.json").read_text())
    path = tmp_path / "x.npz"
    described = {"path": str(path), "images": 30, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert again["metrics"] == result["metrics"] and again["set"] == described
    words = ["--reference", "digits"]
    for more in ("sample.steps=2", "--images=30", "--seed=0"):
        wrong = ["evaluate", tmp_path / "x.npz", *words, "--out", tmp_path / "w", more]
        assert_ends(capsys, wrong, 64, f"{more.partition('=')[0]}", "holds images, so none are generated")
    np.savez(tmp_path / "y.npz", arr_0=every.transpose(0, 2, 3, 1))
    assert_ends(capsys, ["evaluate", tmp_path / "y.npz", *words, "--out", tmp_path / "of_npz"], 64, "of a different set")
    assert json.loads((tmp_path / "of_npz" / "digits" / "evaluation.json").read_text()) == again


def test_kernels_are_named_when_sampling(capsys, run, tmp_path):
    arguments = ["sample", run, "--classes", "3", "--seeds", "1", "--out", str(tmp_path / "grid.png"), *FAST]
    for backend in ("flex", "prefix"):
        assert main([*arguments, f"kernels.attention={backend}"]) == 0
        assert f"attention {backend}" in capsys.readouterr().out
    assert_ends(capsys, [*arguments, "kernels.attention=nosuch"], 78, "kernels.attention = 'nosuch'")


@pytest.fixture
def train(tmp_path):
    """Arguments that train two steps in one process."""
    cache_digits(tmp_path / "data", 1000)
    small = ["train.engine=single", "train.steps=2", "optim.warmup_steps=1", "train.global_batch=8", "data.workers=0"]
    where = ["--run-dir", str(tmp_path / "trained"), f"data.path={tmp_path / 'data'}"]
    return ["train", "--recipe", "digits", *where, *small, "train.checkpoint_every=1"]


def test_named_kernels_are_used_in_training_and_logged(capsys, train):
    assert main([*train, "kernels.attention=prefix"]) == 0
    assert "fp32; attention prefix (PyTorch scaled_dot_product_attention), norms of torch" in capsys.readouterr().out


def test_kernels_that_cannot_train_are_refused_before_the_run_starts(capsys, train, tmp_path):
    assert_ends(capsys, [*train, "kernels.attention=flex"], 78, "flex has no backward pass on a CPU")
    assert not (tmp_path / "trained").exists()


def test_a_step_replayed_from_a_cuda_graph_is_logged_without_hook_metrics(train, tmp_path, monkeypatch):
    """CUDA graphs need a GPU: here the passes are computed instead."""
    monkeypatch.setattr(SingleEngine, "replays_graphs", True)
    monkeypatch.setattr(replicated, "Graphs", lambda device: None)
    assert main([*train, "train.log_every=1"]) == 0
    entries = read_log(tmp_path / "trained")
    assert [entry["step"] for entry in entries] == [1, 2] and all(entry["loss"] > 0 for entry in entries)
    assert all(entry["forward_s"][0] > 0 and "largest_activation" not in entry for entry in entries)
    assert main(["report", str(tmp_path / "trained")]) == 0


def test_compiled_blocks_are_one_graph_also_where_steps_are_logged(train, tmp_path, monkeypatch):
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    assert main([*train, "train.log_every=1", "kernels.compile=true"]) == 0
    assert counted.frame_count == 1
    entries = read_log(tmp_path / "trained")
    assert all(entry["forward_s"][0] > 0 and entry["largest_activation"] > 0 for entry in entries)
    assert all(entry["forward_s"] == [float(f"{entry['forward_s'][0]:.4g}")] for entry in entries)  # one number for each rank
    torch._dynamo.reset()


def test_a_resumed_run_draws_no_initial_weights(train, monkeypatch):
    assert main(train) == 0
    monkeypatch.setattr("xar_scale.startup.initial_weights", None)  # not even called
    assert main([*train, "train.steps=3"]) == 0


def test_previews_come_after_the_checkpoint_of_their_step_and_not_when_stopping(capsys, train, tmp_path, monkeypatch):
    assert main([*train, "sample.every=1", "--stop-after", "0s"]) == 76
    assert newest_valid(tmp_path / "trained").manifest.step == 1 and not (tmp_path / "trained" / "samples").exists()

    def fail(*_, **__):
        raise RuntimeError("no room for pictures")

    monkeypatch.setattr("xar_scale.evaluate.generate.Generator.draw", fail)
    with pytest.raises(RuntimeError, match="no room"):
        main([*train, "sample.every=2"])
    assert newest_valid(tmp_path / "trained").manifest.step == 2


def test_all_blocks_are_recomputed(train, monkeypatch):
    again, recomputed = recompute.checkpoint, []
    monkeypatch.setattr(recompute, "checkpoint", lambda *a, **settings: recomputed.append(1) or again(*a, **settings))
    assert main([*train, "train.recompute=full"]) == 0
    assert len(recomputed) == 2 * 4  # steps, blocks of the encoder and the decoder


@pytest.mark.parametrize(
    "words",
    [
        "sample RUN --out",
        "train --run-dir",
        "train --init-from",
        "train --resume",
        "report RUN --out",
        "plan --out",
        "evaluate RUN --out",
    ],
)
def test_an_empty_path_is_not_the_current_folder(capsys, run, words):
    assert_ends(capsys, [*words.replace("RUN", run).split(), ""], 64, "the path is empty")


@pytest.mark.parametrize("command", ["sample", "plan"])
def test_an_unwritable_output_is_refused_before_the_work(capsys, run, tmp_path, monkeypatch, command):
    """A full disk, because permissions do not stop root."""

    def full(dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(dir / "tmpx"))

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    monkeypatch.setattr("xar_scale.evaluate.generate.open_generator", lambda *_: pytest.fail("it was begun"))
    monkeypatch.setattr("xar_scale.plan.search.search", lambda *_: pytest.fail("it was begun"))
    words = {"sample": [run], "plan": ["--model", "nano", "--gpus", "1", "--gpu", "h100"]}[command]
    out = tmp_path / "new"
    assert_ends(capsys, [command, *words, "--out", out], 74, f"{out}: No space left")


def test_wrong_samples(capsys, run, tmp_path):
    out = tmp_path / "grid.png"
    assert_ends(capsys, ["sample", run, "--out", out, "--classes", ""], 64, "empty entry between commas")
    assert_ends(capsys, ["sample", run, "--out", out, "--classes", "5-2"], 64, "classes 5-2: a range must go from the smaller")
    assert_ends(capsys, ["sample", run, "--out", out, "--seeds", "0-100000000000"], 64, "at most 1,000,000 in all")
    assert_ends(capsys, ["sample", run, "--out", out, "--seeds", str(2**64)], 64, "below 2^64")
    assert_ends(capsys, ["sample", run, "--out", tmp_path / "grid.jpg"], 64, "grid.jpg must be a .png")
    assert_ends(capsys, ["sample", run, "--out", out, "--seeds", "x"], 64, "--seeds 'x'")
    assert_ends(capsys, ["sample", run, "--out", out, "--classes", "cat"], 64, "class 'cat'")
    assert_ends(capsys, ["sample", run, "--out", out, "--classes", "10"], 64, "class 10 is outside 0..9")
    assert_ends(capsys, ["sample", run, "--out", out, "model.classes=3"], 64, "model.classes=3: only sample.* and kernels.*")
    assert_ends(capsys, ["sample", run, "--out", out, "sample.steps=0"], 78, "sample.steps = 0")
    assert not out.exists() and not out.with_suffix(".npz").exists()
    (tmp_path / "file").write_text("")
    assert_ends(capsys, ["sample", run, "--out", tmp_path / "file" / "grid.png"], 74, "file")


def test_wrong_tokenizer_weights(capsys, run, tmp_path):
    out, weights = tmp_path / "grid.png", tmp_path / "kl16.ckpt"
    weights.write_bytes(b"other weights")
    given = f"sample.tokenizer_weights={weights}"
    assert_ends(capsys, ["sample", run, "--out", out, given], 78, str(weights), "tokenizer pixel has no weights")
    made = dataclasses.replace(INFO, tokenizer={"name": "kl16", "sha256": "0123456789abcdef"})
    of_kl16 = Run(tmp_path / "of_kl16", info=made)
    of_kl16.save()
    arguments = ["sample", tmp_path / "of_kl16", "--out", out]
    assert_ends(capsys, arguments, 78, "kl16 needs its weights: set sample.tokenizer_weights to the path of kl16.ckpt")
    assert_ends(capsys, [*arguments, "sample.tokenizer_weights=nowhere.ckpt"], 64, "no weights at nowhere.ckpt")
    digest = hashlib.sha256(b"other weights").hexdigest()
    assert_ends(capsys, [*arguments, given], 65, str(weights), digest[:12], "0123456789ab")
    assert not out.exists()


def test_wrong_archives(capsys, tmp_path):
    words = ["--reference", "digits", "--out", tmp_path / "v"]
    for name, content in (("empty.npz", b""), ("text.npz", b"text")):
        (tmp_path / name).write_bytes(content)
        assert_ends(capsys, ["evaluate", tmp_path / name, *words], 65, name, "is not an npz of arrays, or is torn")
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert_ends(capsys, ["evaluate", tmp_path / "array.npy", *words], 65, "array.npy")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((2, 9, 8, 3), np.uint8), arr_1=np.zeros(2, int))
    assert_ends(capsys, ["evaluate", tmp_path / "other.npz", *words], 65, "the images are uint8(3, 9, 8)")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.array([3, 10]))
    assert_ends(capsys, ["evaluate", tmp_path / "other.npz", *words], 65, "expected one of 0..9 for each of 2 images")
    assert not (tmp_path / "v").exists()


def test_a_run_folder_that_is_a_file(capsys, tmp_path):
    cache_digits(tmp_path / "data", 1000)
    (tmp_path / "run").write_text("mine")
    arguments = ["train", "--recipe", "digits", "--run-dir", tmp_path / "run", f"data.path={tmp_path / 'data'}"]
    assert_ends(capsys, [*arguments, "train.engine=single"], 74, str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("error", [ProcessError("workers died"), PermissionError(13, "Permission denied", "/a")])
def test_an_error_on_one_rank_is_printed_by_that_rank(capsys, monkeypatch, error):
    monkeypatch.setenv("RANK", "3")
    if isinstance(error, ProcessError):
        error.rank = 3  # as data/loader.py sets it

    def fail():
        raise error

    assert exit_code_of("xar-scale", fail) in (71, 74)
    assert capsys.readouterr().err in ("xar-scale: workers died\n", "xar-scale: /a: Permission denied\n")


def of_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nCPU stack: ...")


def of_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("run", [lambda: torch.empty(10**15), lambda: np.empty(10**15), of_cuda, of_cublas])
def test_exhausted_memory_is_one_line_of_the_rank_that_has_none(run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert exit_code_of("xar-scale", run) == 71
    said = capsys.readouterr().err
    assert re.fullmatch(r"xar-scale: rank 3 \(\S+\) is out of memory: \S.*\n", said), said


def test_names_in_messages_end_no_line_and_command_no_terminal(capsys):
    def run() -> None:
        raise UsageError("no sample s\nxar-scale: all is well \x1b[2J\udcff, Größe")

    assert exit_code_of("xar-scale", run) == 64
    assert capsys.readouterr().err == "xar-scale: no sample s\\nxar-scale: all is well \\x1b[2J\\udcff, Größe\n"


def test_a_bug_keeps_its_traceback():
    def run() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        exit_code_of("xar-scale", run)


def test_an_interrupted_command_prints_one_line(capsys):
    def run() -> None:
        raise KeyboardInterrupt

    assert exit_code_of("sweep", run) == 130 and capsys.readouterr().err == "sweep: interrupted\n"


def test_a_closed_output_pipe_ends_the_command_silently():
    program = (
        "from xar_scale import dist, program; "
        "dist.run(lambda: program.exit_code_of('show', lambda: [*map(print, range(100_000))]))"
    )
    command = f'"{sys.executable}" -c "{program}" | head -n 1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 141)


@pytest.mark.parametrize(("rank", "spoken", "waited"), [("0", "sweep: no such thing\n", []), ("1", "", [program.PATIENCE_S])])
def test_a_silent_rank_does_not_exit_before_the_reporting_one(rank, spoken, waited, monkeypatch, capsys):
    """A launcher would end the reporting rank at once, and nothing would be printed."""
    naps = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(program.time, "sleep", naps.append)

    def run() -> None:
        raise UsageError("no such thing")

    assert exit_code_of("sweep", run) == 64 and capsys.readouterr().err == spoken and naps == waited
