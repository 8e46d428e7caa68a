"""Bad input ends with one clear line, the documented exit code, no traceback, and nothing overwritten."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.processes import assert_one_line, launch
from tests.unit.conftest import assert_ends
from xar_scale.cli import main
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import ShardWriter
from xar_scale.evaluate.digits import load_digits
from xar_scale.tokenizers.pixel import PixelTokenizer

SMALL = ["train.steps=4", "optim.warmup_steps=1", "train.global_batch=8", "train.log_every=1", "train.checkpoint_every=2"]


@pytest.fixture(scope="module")
def run(folder):
    """A finished run of one process, to damage copies of."""
    ended = train(folder, "run", "train.engine=single")
    assert ended.codes == [0], ended.text
    return folder / "run"


def arguments(folder: Path, run: str, *more: str, data: str = "data") -> list[str]:
    return ["train", "--recipe", "digits", "--run-dir", str(folder / run), f"data.path={folder / data}", *SMALL, *more]


def train(folder: Path, run: str, *more: str, world: int = 1, data: str = "data"):
    return launch(world, ["-m", "xar_scale", *arguments(folder, run, *more, data=data)], folder / "logs" / run)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_missing_data_folder(folder):
    assert_one_line(train(folder, "new", world=2, data="nowhere"), 65, "no data folder at", "nowhere")
    assert not (folder / "new").exists()


def test_a_truncated_shard(folder):
    shutil.copytree(folder / "data", folder / "cut")
    shard = folder / "cut" / "digits-000001.tar"
    size = shard.stat().st_size
    os.truncate(shard, size - 700)
    ended = train(folder, "new", world=2, data="cut")
    assert_one_line(ended, 65, "digits-000001.tar is truncated", str(size - 700), str(size))
    assert not (folder / "new").exists()


def test_a_flipped_bit_in_a_latent_names_shard_and_sample(folder):
    shutil.copytree(folder / "data", folder / "flipped")
    for shard in (folder / "flipped").glob("*.tar"):  # in every third sample, so that both ranks meet some
        content = np.fromfile(shard, np.uint8)
        index = json.loads(shard.with_suffix(".index.json").read_text())
        content[np.array(index["latent"]["data"])[::3] + 130] ^= 1
        content.tofile(shard)
    ended = train(folder, "new-flipped", world=2, data="flipped")
    assert_one_line(ended, 65, "digits-00000", ".tar, sample ", "checksum does not match")


def test_a_checkpoint_with_a_flipped_byte_when_it_is_the_only_one(folder, run, capsys):
    damaged = folder / "only"
    shutil.copytree(run, damaged)
    shutil.rmtree(damaged / "checkpoints" / "step-00000002")
    victim = next((damaged / "checkpoints" / "step-00000004").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 64
    victim.write_bytes(content)
    before = files(damaged)
    assert main(arguments(folder, "only", "train.engine=single", "train.steps=6")) == 65
    said, error = capsys.readouterr()
    assert f"{victim.name} is corrupt" in said and error.count("\n") == 1
    assert error.startswith("xar-scale: none of the 1 checkpoints") and "is valid" in error
    assert files(damaged) == before

    out = folder / "samples.png"
    assert_ends(capsys, ["sample", victim.parent, "--seeds", "1", "--out", out], 65, victim.name, "is corrupt")
    assert not out.exists()


def test_a_global_batch_that_does_not_divide(folder):
    ended = train(folder, "new", "train.global_batch=128", "train.micro_batch=24", world=2)
    assert_one_line(ended, 78, "global_batch 128 is not divisible by micro_batch 24 x world 2 = 48")
    assert not (folder / "new").exists()


def test_a_run_that_exists_is_not_started_over(folder, run, capsys):
    before = files(run)
    for resume in ("none", str(run / "checkpoints" / "step-00000002")):
        assert_ends(capsys, arguments(folder, "run", "train.engine=single", "--resume", resume), 64, "holds checkpoints")
    assert files(run) == before


def test_a_refused_deepspeed_config_leaves_the_run_as_it_was(folder, run):
    before = files(run)
    (folder / "fp16.json").write_text('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}')
    ended = train(folder, "run", "train.steps=6", f"train.ds_config={folder / 'fp16.json'}")
    assert_one_line(ended, 78, "fp16 contradicts train.precision fp32")
    ended = train(folder, "run", "train.steps=6", "train.precision=fp16")
    assert_one_line(ended, 78, "train.precision fp16", "fsdp2")
    assert files(run) == before


def test_another_model_does_not_continue_the_run(folder, run, capsys):
    before = files(run)
    words = arguments(folder, "run", "train.engine=single", "model.width=64")
    assert_ends(capsys, words, 78, "model.width is 64", "was made with 128")
    assert files(run) == before


@pytest.mark.parametrize(("value", "code", "says"), [(np.nan, 65, "its array is not finite"), (1e20, 70, "step 2 cannot be")])
def test_a_value_that_one_rank_reads_stops_all_before_the_weights_change(folder, value, code, says):
    """In a latent with a right checksum, of a sample that only the second rank of two reads at step 2."""
    images, labels = load_digits()
    latents = PixelTokenizer().encode(images).astype(np.float32)
    good = LatentShards(folder / "data")
    keys = read_at_step(good, folder, step=2)
    latents[int(keys[-1]), 0, 0, 0] = value
    name = f"bad{code}"
    info = dataclasses.replace(good.info, dtype="float32", shards=())
    with ShardWriter(folder / name, info, prefix="digits", samples_per_shard=500) as writer:
        for number, (latent, label) in enumerate(zip(latents, labels, strict=True)):
            writer.add(f"{number:06d}", int(label), latent)
    ended = train(folder, f"{name}-run", "guard.max_quarantined=0", world=2, data=name)
    assert_one_line(ended, code, says, f"sample {keys[-1]} " if code == 65 else "samples to quarantine: 1, ")
    assert sorted(os.listdir(folder / f"{name}-run" / "checkpoints")) == ["latest", "step-00000002"]


def read_at_step(shards: LatentShards, folder: Path, step: int) -> tuple[str, ...]:
    from tests.conftest import digits_config
    from xar_scale.data.loader import LatentDataset
    from xar_scale.model.entities import create_layout

    config = digits_config(f"data.path={folder / 'data'}", *SMALL)
    dataset = LatentDataset(shards, config, create_layout(config.model))
    return dataset.__getitems__(list(range(step * 8, step * 8 + 8))).keys
