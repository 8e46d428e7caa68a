"""A few training steps on a GPU through the command line: every engine matches the losses of one process on a CPU."""

import json

import pytest

from tests.processes import launch

STEPS = ["train.steps=5", "train.global_batch=32", "train.log_every=1", "optim.warmup_steps=1", "data.workers=0"]


def logged(folder, name, *more, program=("-m", "xar_scale"), **environment):
    """What a run printed, and its metrics."""
    own = [*STEPS, f"data.path={folder / 'data'}", *more]
    run = [*program, "train", "--recipe", "digits", "--run-dir", str(folder / name), *own]
    ended = launch(1, run, folder / "logs" / name, **environment)
    assert ended.codes == [0], ended.text
    return ended.text, [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def losses(folder, name, *more, **environment):
    return [line["loss"] for line in logged(folder, name, *more, **environment)[1]]


@pytest.fixture(scope="module")
def cpu(folder):
    return losses(folder, "cpu", "train.engine=single", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("tf32", 1e-2), ("bf16", 5e-2), ("fp16", 5e-2)])
@pytest.mark.parametrize("engine", ["single", "ddp", "deepspeed", "fsdp2"])
def test_every_engine_trains_on_a_gpu_as_on_a_cpu(folder, cpu, engine, precision, tolerance):
    if (engine, precision) == ("deepspeed", "fp16"):
        pytest.skip("refused")
    name = f"{engine}-{precision}"
    gpu = losses(folder, name, f"train.engine={engine}", f"train.precision={precision}", DS_ACCELERATOR="cuda")
    assert gpu == pytest.approx(cpu, rel=tolerance)


def broken(step):
    """A run whose activations in bf16 break in one step, on one process."""
    fault = json.dumps([{"kind": "activation", "step": step, "until": step + 1, "rank": 0}])
    return {"program": ("-m", "tests.injected", fault), "DS_ACCELERATOR": "cuda"}


@pytest.mark.parametrize("engine", ["single", "ddp", "deepspeed", "fsdp2"])
def test_a_bf16_only_fault_is_survived_on_a_gpu(folder, engine):
    more = [f"train.engine={engine}", "train.precision=bf16", "guard.hold_steps=2"]
    _, lines = logged(folder, f"fault-{engine}", *more, **broken(1))
    assert [line["precision"] for line in lines] == ["bf16", "tf32", "tf32", "tf32", "bf16"]


@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_micro_batches_are_captured_again_after_a_fault_and_after_samples(folder, engine):
    more = [f"train.engine={engine}", "train.precision=bf16", "guard.hold_steps=5", "train.steps=16", "sample.every=8"]
    said, lines = logged(folder, f"recorded-{engine}", *more, "kernels.compile=true", **broken(4))
    assert [line["precision"] for line in lines] == ["bf16"] * 4 + ["tf32"] * 6 + ["bf16"] * 6
    # each after two warm-up runs: in bf16, in TF32 (then samples are drawn), and in bf16 again
    assert said.count("a pass is captured") == 3
    assert "a pass is captured" not in (eager := logged(folder, f"eager-{engine}", *more, **broken(4)))[0]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in eager[1]], rel=5e-2)
