"""A few steps of training on a GPU, by the command line: every engine gives the losses of one process on a CPU."""

import json

import pytest

from tests.processes import launch

STEPS = ["train.steps=5", "train.global_batch=32", "train.log_every=1", "optim.warmup_steps=1", "data.workers=0"]


def logged(folder, name, *more, program=("-m", "xar_scale"), **environment):
    own = [*STEPS, f"data.path={folder / 'data'}", *more]
    run = [*program, "train", "--recipe", "digits", "--run-dir", str(folder / name), *own]
    ended = launch(1, run, folder / "logs" / name, **environment)
    assert ended.codes == [0], ended.text
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def losses(folder, name, *more, **environment):
    return [line["loss"] for line in logged(folder, name, *more, **environment)]


@pytest.fixture(scope="module")
def cpu(folder):
    return losses(folder, "cpu", "train.engine=single", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 1e-2), ("bf16", 5e-2), ("fp16", 5e-2)])
@pytest.mark.parametrize("engine", ["single", "ddp", "deepspeed", "fsdp2"])
def test_every_engine_learns_on_a_gpu_as_on_a_cpu(folder, cpu, engine, precision, tolerance):
    if (engine, precision) == ("deepspeed", "fp16"):
        pytest.skip("refused")
    name = f"{engine}-{precision}"
    gpu = losses(folder, name, f"train.engine={engine}", f"train.precision={precision}", DS_ACCELERATOR="cuda")
    assert gpu == pytest.approx(cpu, rel=tolerance)


@pytest.mark.parametrize(
    "words",
    [
        ["single"],
        *([engine, "kernels.compile=true", "sample.every=2"] for engine in ("single", "ddp")),
        ["deepspeed"],
        ["fsdp2"],
    ],
)
def test_a_fault_of_bf16_alone_is_outlived_on_a_gpu(folder, words):
    engine, *others = words
    fault = json.dumps([{"kind": "activation", "step": 1, "until": 2, "rank": 0}])
    more = [f"train.engine={engine}", *others, "train.precision=bf16", "guard.hold_steps=2"]
    lines = logged(folder, "-".join(["fault", *words]), *more, program=("-m", "tests.injected", fault), DS_ACCELERATOR="cuda")
    assert [line["precision"] for line in lines] == ["bf16", "tf32", "tf32", "tf32", "bf16"]
