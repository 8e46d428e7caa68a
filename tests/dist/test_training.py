"""Training on 1, 2 and 3 ranks: the same curve, the same state, and exact resume, through the command line itself."""

import json
import os
import random
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.dist.states import assert_bitwise, assert_near, state
from tests.processes import finish, kill, launch, start
from tests.unit.damage import flip_byte

pytestmark = pytest.mark.long
STEPS = 20
SETTINGS = [
    f"train.steps={STEPS}",
    "train.global_batch=96",
    "train.micro_batch=16",  # passes a step: 6, 3 and 2 on 1, 2 and 3 ranks
    "train.log_every=1",
    "train.checkpoint_every=10",
    "optim.warmup_steps=5",
    "optim.ema_snapshots_every=7",  # so that the power-function averages are held to all of the below
    "train.ds_config=tests/dist/zero3.json",
]


def arguments(folder: Path, run: str, engine: str, *more: str) -> list[str]:
    own = [f"data.path={folder / 'data'}", f"train.engine={engine}"]
    return ["-m", "xar_scale", "train", "--recipe", "digits", "--run-dir", str(folder / run), *SETTINGS, *own, *more]


def train(folder: Path, run: str, world: int, engine: str, *more: str) -> Path:
    ended = launch(world, arguments(folder, run, engine, *more), folder / "logs" / run)
    assert ended.codes == [0] * world, ended.text
    return folder / run


def curve(run: Path, name: str = "loss") -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], STEPS + 1))
    return torch.tensor([line[name] for line in lines], dtype=torch.float64)


@pytest.fixture(scope="module")
def single(folder):
    return train(folder, "single", 1, "single")


@pytest.fixture(scope="module")
def zero2(folder):
    return train(folder, "zero2", 2, "deepspeed")


@pytest.fixture(scope="module")
def zero3(folder):
    return train(folder, "zero3", 3, "deepspeed")


@pytest.fixture(scope="module")
def fsdp2(folder):
    return train(folder, "fsdp2", 2, "fsdp2")


@pytest.fixture(scope="module")
def fsdp3(folder):
    return train(folder, "fsdp3", 3, "fsdp2")


@pytest.fixture(scope="module")
def ddp2(folder):
    return train(folder, "ddp2", 2, "ddp")


def test_every_engine_gives_the_same_losses_and_norms_on_2_and_3_ranks(single, zero2, zero3, fsdp2, fsdp3, ddp2):
    assert curve(single)[-1] < 0.9 * curve(single)[0]  # they learn at all
    for run in (zero2, zero3, fsdp2, fsdp3, ddp2):
        for name in ("loss", "grad_norm"):
            torch.testing.assert_close(curve(run, name), curve(single, name), rtol=1e-5, atol=0)
        assert torch.equal(curve(run, "lr"), curve(single, "lr"))


def test_weights_moments_and_ema_are_the_same_with_every_engine_on_any_number_of_ranks(
    single, zero2, zero3, fsdp2, fsdp3, ddp2
):
    for run in (zero2, zero3, fsdp2, fsdp3, ddp2):
        assert_near(state(run, STEPS), state(single, STEPS))
        for step in (7, 14, STEPS):
            assert_near(state(run, step, "ema"), state(single, step, "ema"))
    kinds = {name.split("/")[0] for name in state(single, STEPS)}
    assert kinds == {"model", "ema", "ema-0.05", "ema-0.10", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_bf16_is_near_fp32_and_not_it(folder, single, engine):
    run = train(folder, f"bf16-{engine}", 2, engine, "train.precision=bf16")
    torch.testing.assert_close(curve(run), curve(single), rtol=2e-2, atol=0)
    assert not torch.allclose(curve(run), curve(single), rtol=1e-5)
    first, exact = (state(at, 10) for at in (run, single))
    for name, weight in first.items():  # float32 that has no 16-bit values: what is stored was never rounded
        if name.startswith("model/") and weight.numel() > 1000:
            assert (weight != weight.bfloat16().float()).float().mean() > 0.9, name
            assert (weight - exact[name]).norm() < 0.1 * exact[name].norm(), name


def test_training_moves_every_part_of_the_state(zero2):
    before, after = state(zero2, 10), state(zero2, STEPS)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(not torch.equal(after[name], after[name.replace("ema/", "model/")]) for name in after if name.startswith("ema/"))


def test_the_average_follows_every_step(folder):
    run = train(
        folder, "average", 1, "single", "train.checkpoint_every=1", "train.keep_last=9", "train.steps=5", "optim.ema_decay=0.7"
    )
    states = [state(run, step) for step in range(1, 6)]
    for before, after in pairwise(states):
        for name, weight in after.items():
            if name.startswith("model/"):
                average = name.replace("model/", "ema/")
                torch.testing.assert_close(after[average], 0.7 * before[average] + 0.3 * weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2", "ddp"])
def test_10_and_10_steps_are_20_bitwise_on_as_many_ranks(folder, zero2, fsdp2, ddp2, engine):
    run = {"deepspeed": zero2, "fsdp2": fsdp2, "ddp": ddp2}[engine]
    resumed = train(folder, f"{run.name}-resumed", 2, engine, "--resume", str(run / "checkpoints" / "step-00000010"))
    assert_bitwise(state(resumed, STEPS), state(run, STEPS))
    assert_bitwise(state(resumed, 14, "ema"), state(run, 14, "ema"))
    assert torch.equal(curve(resumed), curve(run)[10:])


@pytest.mark.parametrize(
    ("before", "after", "world", "recompute"),
    [
        ("zero2", "deepspeed", 3, "selective"),  # which changes no number either
        ("zero2", "single", 1, "selective"),
        ("zero2", "fsdp2", 3, "full"),
        ("fsdp3", "deepspeed", 2, "none"),
        ("fsdp3", "fsdp2", 1, "selective"),
        ("single", "deepspeed", 2, "full"),
    ],
)
def test_10_and_10_steps_are_20_with_another_engine_or_number_of_ranks(folder, request, before, after, world, recompute):
    run = request.getfixturevalue(before)
    more = [f"train.recompute={recompute}", "--resume", str(run / "checkpoints" / "step-00000010")]
    resumed = train(folder, f"{before}-to-{after}{world}", world, after, *more)
    assert_near(state(resumed, STEPS), state(run, STEPS))
    torch.testing.assert_close(curve(resumed), curve(run)[10:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("victims", [[0, 1], [1]])
def test_killed_ranks_go_on_exactly_from_the_last_checkpoint(folder, zero2, victims):
    """Killed at a moment that differs by chance; of one that is killed the others are taken along by the launcher."""
    name = f"killed{len(victims)}"
    run, logs = folder / name, folder / "logs" / name
    ranks = start(2, arguments(folder, name, "deepspeed", "--resume", "auto"), logs)
    try:
        metrics, begun = run / "metrics.jsonl", time.monotonic()
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 13:
            assert all(rank.poll() is None for rank in ranks), [log.read_text() for log in logs.iterdir()]
            assert time.monotonic() - begun < 200
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.05))
        for victim in victims:
            os.kill(ranks[victim].pid, signal.SIGKILL)
        time.sleep(0.5)
    finally:
        kill(ranks)
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000010"]
    again = finish(start(2, arguments(folder, name, "deepspeed"), logs), logs)
    assert again.codes == [0, 0], again.text
    assert "resumed from" in again.outputs[0] and "at step 10" in again.outputs[0]
    assert torch.equal(curve(run), curve(zero2))  # one line a step, none twice
    assert_bitwise(state(run, STEPS), state(zero2, STEPS))


def test_a_damaged_checkpoint_is_passed_over_out_loud_and_replaced(folder, zero2):
    run = folder / "damaged"
    shutil.copytree(zero2, run)
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    victim = sorted(newest.glob("*.safetensors"))[1]  # the second rank's: the first must hear of it
    flip_byte(victim)
    ended = launch(2, arguments(folder, "damaged", "deepspeed"), folder / "logs" / "damaged")
    assert ended.codes == [0, 0], ended.text
    assert f"{victim.name} is corrupt" in ended.outputs[0]
    assert "trying the checkpoint before it" in ended.outputs[0] and "at step 10" in ended.outputs[0]
    assert_bitwise(state(run, STEPS), state(zero2, STEPS))
    assert sorted(os.listdir(run / "checkpoints")) == ["damaged-step-00000020", "latest", "step-00000010", "step-00000020"]


