"""A few steps of training on a GPU, by the command line: every engine gives the losses of one process on a CPU."""

import json

import pytest

from tests.processes import launch
from xar_scale.evaluate.digits import cache_digits

STEPS = ["train.steps=5", "train.global_batch=32", "train.log_every=1", "optim.warmup_steps=1", "data.workers=0"]


def losses(folder, name, *more, **environment):
    own = [*STEPS, f"data.path={folder / 'data'}", *more]
    run = ["-m", "xar_scale", "train", "--recipe", "digits", "--run-dir", str(folder / name), *own]
    ended = launch(1, run, folder / "logs" / name, **environment)
    assert ended.codes == [0], ended.text
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_single_and_zero3_learn_on_a_gpu_as_on_a_cpu(tmp_path):
    cache_digits(tmp_path / "data", samples_per_shard=500)
    cpu = losses(tmp_path, "cpu", "train.engine=single", CUDA_VISIBLE_DEVICES="")
    for engine in ("single", "deepspeed"):
        for precision, tolerance in (("fp32", 1e-4), ("tf32", 1e-2), ("bf16", 5e-2)):
            name = f"{engine}-{precision}"
            gpu = losses(tmp_path, name, f"train.engine={engine}", f"train.precision={precision}", DS_ACCELERATOR="cuda")
            assert gpu == pytest.approx(cpu, rel=tolerance), name
