"""Images into latents by the real command: in one process, under torchrun, killed, and with input that it refuses."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.processes import command, finish, kill, launch, start
from tests.unit.encoding import smooth, tars
from tools import cache_latents
from xar_scale.data.images import center_crop
from xar_scale.data.reader import LatentShards

IMAGES = 180
WORDS = ["--tokenizer", '{"name": "pixel", "patch": 4, "image_channels": 3}', "--size", "32", "--samples-per-shard", "8"]
TOOL = "tools/cache_latents.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        folder = root / f"n{number % 4}"
        folder.mkdir(exist_ok=True)
        smooth(200, 150, number).save(folder / f"i{number:03d}.JPEG")
    return root


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted process's set."""
    out = tmp_path_factory.mktemp("whole") / "set"
    done = images(source, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"180 samples in 23 shards, 0 bad images skipped: {out}\n"
    assert done.stderr == f"listing the images of {source}\n180 images of 4 classes\n"
    return files(out)


def images(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return command(sys.executable, TOOL, "images", str(source), "--out", str(out), *WORDS, *more)


@pytest.fixture
def refused(monkeypatch, capsys):
    """The exit code and standard error of the command in this process."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cache_latents", *words])
        return cache_latents.main(), capsys.readouterr().err

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    return [TOOL, "images", str(source), "--out", str(out), *WORDS, *more]


def wait_for_records(out: Path, count: int) -> None:
    """Or until the set is complete: a busy machine may not check in between."""
    for _ in range(6000):
        if len(list(out.glob(".encoding/latents-*.json"))) >= count or (out / "dataset.json").exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} records in {out}")


def test_the_set_is_whole_and_the_same_command_again_says_so(source, whole, tmp_path, refused):
    out = tmp_path / "set"
    shutil.copytree(source, tmp_path / "copy")
    assert images(source, out, "--workers", "0", "--classes", "4", "--precision", "fp32").returncode == 0
    assert files(out).keys() == whole.keys()
    again = images(source, out)
    assert again.returncode == 0 and again.stderr == ""
    assert again.stdout == f"already complete: 180 samples in 23 shards, 0 bad images skipped: {out}\n"
    for other in (
        arguments(tmp_path / "copy", out),
        arguments(source, out, "--batch", "8"),
        arguments(source, out, "--no-flip"),
    ):
        assert refused(*other[1:]) == (64, f"cache_latents: {out} already holds a data set; remove it or write elsewhere\n")
    well = command(sys.executable, "tools/verify_shards.py", str(out))
    assert well.returncode == 0 and well.stdout.endswith("every byte as written, every value finite\n"), well.stderr


def test_torchrun_makes_the_same_set(source, whole, tmp_path):
    out = tmp_path / "set"
    done = command("torchrun", "--nproc-per-node", "2", *arguments(source, out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"180 samples in 23 shards, 0 bad images skipped: {out}\n"
    assert files(out) == whole


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(source, whole, tmp_path):
    """As an array of jobs: processes that no launcher joins."""
    out, generator = tmp_path / "set", np.random.default_rng()
    for time_, records in enumerate((1, 5, 9)):
        ranks = start(2, arguments(source, out), tmp_path / f"logs{time_}")
        try:
            wait_for_records(out, records)
            time.sleep(generator.uniform(0, 0.03))
        finally:
            kill(ranks)
        if (out / "dataset.json").exists():  # the machine was faster than this moment
            assert time_ > 0
            break
    made = {path: path.stat().st_mtime_ns for path in out.glob(".encoding/latents-*.json")}
    kept = {path.name.removesuffix(".json"): (out / path.name).with_suffix(".tar").stat().st_mtime_ns for path in made}
    ended = launch(2, arguments(source, out), tmp_path / "logs")
    assert ended.codes == [0, 0] and "Traceback" not in ended.text, ended.text
    assert files(out) == whole
    assert {name: (out / f"{name}.tar").stat().st_mtime_ns for name in kept} == kept


def test_a_killed_decoder_ends_it_with_its_own_code_and_one_line(source, whole, tmp_path):
    for attempt in range(5):  # on a busy machine it may be done before it is found
        out = tmp_path / f"set{attempt}"
        ranks = start(1, arguments(source, out), tmp_path / "logs")

        def shoot(out=out, ranks=ranks):
            wait_for_records(out, 1)
            for first in Path(f"/proc/{ranks[0].pid}/task/{ranks[0].pid}/children").read_text().split()[:1]:
                os.kill(int(first), signal.SIGKILL)

        ended = finish(ranks, tmp_path / "logs", meanwhile=shoot)
        if ended.codes != [0]:
            break
    assert ended.codes == [71], ended.text
    assert "Traceback" not in ended.text
    assert ended.text.splitlines()[-1].startswith("cache_latents: a data worker died: ")
    assert ended.text.splitlines()[-1].endswith("run the same command again to resume")
    assert launch(1, arguments(source, out), tmp_path / "more").codes == [0] and files(out) == whole


def test_bad_images_end_it_or_are_counted(source, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    for name in ("n0/i000.JPEG", "n3/i007.JPEG"):
        (tmp_path / "copy" / name).write_bytes(b"no image")
    out = tmp_path / "set"
    ended = launch(2, arguments(tmp_path / "copy", out, "--max-bad", "1"), tmp_path / "logs")
    assert 65 in ended.codes and set(ended.codes) <= {0, 65}, ended.text  # one may have finished its shards by then
    assert "Traceback" not in ended.text and "2 bad images, --max-bad allows 1: " in ended.text
    for code, output in zip(ended.codes, ended.outputs, strict=True):
        assert (output.splitlines() or [""])[-1].startswith("cache_latents: ") == (code == 65)
    assert not (out / "dataset.json").exists()
    done = images(tmp_path / "copy", out, "--max-bad", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"178 samples in 23 shards, 2 bad images skipped: {out}\n"
    assert sorted(LatentShards(out).info.images["skipped"]) == ["n0/i000.JPEG", "n3/i007.JPEG"]


def test_tars_and_the_autoencoder_of_a_file(tmp_path, kl16, kl16_weights, refused):
    tars(tmp_path / "tars", [4, 0, 4])
    words = ["images", str(tmp_path / "tars"), "--out", str(tmp_path / "set"), "--weights", str(kl16_weights), "--size", "16"]
    code, said = refused(*words)
    assert code == 64 and "which do not give the number of classes: set --classes" in said
    done = command(sys.executable, TOOL, *words, "--classes", "5", "--precision", "bf16", "--batch", "2", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    info = LatentShards(tmp_path / "set").info
    assert (info.tokenizer["name"], len(info.tokenizer["sha256"]), info.stored) == ("kl16", 64, "moments")
    assert (info.shape, info.dtype, info.samples, info.images["precision"]) == ((32, 1, 1), "float32", 3, "bf16")
    sample = LatentShards(tmp_path / "set").read(0, 0)
    image = np.asarray(center_crop(smooth(8, 8, int(sample.key[-1])), 16)).transpose(2, 0, 1)[None]
    exact = kl16.encode(image, "float32")[0]
    off = np.abs(sample.latent - exact).max() / np.abs(exact).max()
    assert 1e-4 < off < 0.1  # computed in bfloat16: float32 in other batches is off by 1e-6


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nowhere", "--tokenizer", "pixel"], 64, "no folder at "),
        (["."], 64, "tokenizer kl16 needs --weights, the path of kl16.ckpt; --tokenizer is kl16"),
        ([".", "--weights", "nowhere.ckpt"], 64, "no weights at nowhere.ckpt"),
        ([".", "--weights", "x", "--tokenizer", "pixel"], 64, "--weights is only for tokenizer kl16"),
        ([".", "--tokenizer", "vq"], 64, "--tokenizer: no tokenizer 'vq' with settings {}; available: pixel, kl16"),
        ([".", "--tokenizer", "{torn"], 64, "--tokenizer '{torn' is not JSON"),
        ([".", "--tokenizer", '{"patch": 2}'], 64, "is not a JSON object with a name"),
        ([".", "--tokenizer", '{"name": "pixel", "patch": 0}'], 64, "--tokenizer: tokenizer pixel: patch 0"),
        ([".", "--tokenizer", '{"name": "pixel", "image_channels": 2}'], 64, "image_channels 2"),
        ([".", "--tokenizer", "pixel", "--size", "15"], 78, "15x15 pixels do not fit"),
        ([".", "--tokenizer", "pixel", "--size", "0"], 64, "--size must be at least 1, not 0"),
        ([".", "--tokenizer", "pixel", "--max-bad", "-1"], 64, "--max-bad must be at least 0, not -1"),
        ([".", "--tokenizer", "pixel", "--workers", "-1"], 64, "--workers must be at least 0, not -1"),
        ([".", "--tokenizer", "pixel", "--samples-per-shard", "0"], 64, "--samples-per-shard must be at least 1, not 0"),
        ([".", "--tokenizer", "pixel", "--precision", "fp8"], 64, "invalid choice: 'fp8'"),
        ([".", "--tokenizer", "pixel", "--precision", "fp16"], 64, "invalid choice: 'fp16'"),
        ([".", "--tokenizer", "pixel", "--nosuch"], 64, "unrecognized arguments: --nosuch"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, code, says, tmp_path, refused):
    found, said = refused("images", *words, "--out", str(tmp_path / "set"))
    lines = said.splitlines()
    assert found == code and lines[-1].startswith("cache_latents: ") and says in lines[-1] and len(lines) <= 2
    assert not (tmp_path / "set").exists()
