"""Parameter groups, the learning rate, the EMA, precision modes, and what a run logs."""

import contextlib
import errno
import json
import math
import os
import threading
import typing
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.conftest import nano_model, normal, shapes_of
from xar_scale import metrics as metrics_module
from xar_scale.config import OptimConfig, TrainConfig
from xar_scale.ema import EMA
from xar_scale.metrics import Metrics, memory_gb, read_log
from xar_scale.optim import create_adamw, learning_rate, parameter_groups
from xar_scale.precision import MODES, apply_matmul_mode


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = nano_model()
    decayed, plain = parameter_groups(dict(model.named_parameters()), shapes_of(model), OptimConfig(lr=1.0, weight_decay=0.07))
    grouped = [id(parameter) for group in (decayed, plain) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert decayed["weight_decay"] == 0.07 and plain["weight_decay"] == 0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim <= 1 for parameter in plain["params"])
    assert any(parameter is model.class_embed.weight for parameter in decayed["params"])
    assert any(parameter is model.in_norm.weight for parameter in plain["params"])


def test_a_matrix_in_flat_shards_decays():
    model = nano_model()
    shapes = shapes_of(model)
    matrices = {id(parameter) for parameter in model.parameters() if parameter.ndim > 1}
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)  # as ZeRO-3 leaves it
    decayed, _ = parameter_groups(dict(model.named_parameters()), shapes, OptimConfig(lr=1.0))
    assert {id(parameter) for parameter in decayed["params"]} == matrices


def test_the_optimizer_takes_its_settings():
    model = nano_model()
    optimizer = create_adamw(
        dict(model.named_parameters()),
        shapes_of(model),
        OptimConfig(lr=0.3, betas=(0.8, 0.7), eps=1e-5, weight_decay=0.1),
        torch.device("cpu"),
    )
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.8, 0.7), 1e-5, decay)


def test_on_a_cpu_steps_are_bitwise_equal_however_a_matrix_is_sharded():
    def stepped(size: int) -> torch.Tensor:
        parts = [part.clone() for part in normal(0, 1001, dtype=torch.float32).split(size)]
        named = {str(number): part for number, part in enumerate(parts)}
        shapes, config = dict.fromkeys(named, torch.Size([91, 11])), OptimConfig(lr=0.3, weight_decay=0.1)
        optimizer = create_adamw(named, shapes, config, torch.device("cpu"))
        for step in range(3):
            for part, gradient in zip(parts, normal(step + 1, 1001, dtype=torch.float32).split(size), strict=True):
                part.grad = gradient.clone()
            optimizer.step()
        return torch.cat(parts)

    assert torch.equal(stepped(7), stepped(1001))  # fewer values than a CPU vector register holds, and many


def rates(steps: int, **settings) -> list[float]:
    config = OptimConfig(**settings)
    backward = [learning_rate(config, step, steps) for step in reversed(range(steps))]
    forward = [learning_rate(config, step, steps) for step in range(steps)]
    assert forward == backward[::-1]  # a function of the step, not of what was asked before
    return forward


def test_the_rate_warms_up_stays_and_falls_along_a_cosine():
    found = rates(100, lr=2.0, final_lr=0.5, warmup_steps=10, decay_share=0.4)
    assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])  # the first is not zero
    assert found[10:60] == [2.0] * 50
    assert found[60] == 2.0 and found[80] == pytest.approx(1.25)  # halfway down
    assert found[60:] == pytest.approx([0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * n / 40)) for n in range(40)])
    assert found[9:] == sorted(found[9:], reverse=True) and min(found[60:]) > 0.5
    assert found[99] == pytest.approx(0.5, abs=0.01)


def test_without_warmup_and_decay_the_rate_is_constant():
    assert rates(7, lr=0.1) == [0.1] * 7


def test_decay_begins_after_the_warmup_at_the_earliest():
    found = rates(20, lr=1.0, warmup_steps=10, decay_share=1.0)
    assert found[9] == found[10] == 1.0 and found[11] < 1.0
    assert rates(10, lr=1.0, warmup_steps=10, decay_share=0.5) == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_the_ema_matches_the_naive_loop_and_leaves_the_weights():
    weights = [normal(n, 5, dtype=torch.float32).requires_grad_() for n in range(3)]
    ema = EMA(weights, decay=0.9)
    expected = [weight.tolist() for weight in weights]
    assert [average.tolist() for average in ema.tensors] == expected
    for step in range(4):
        with torch.no_grad():
            for weight in weights:
                weight += step - 1.5
        kept = [weight.detach().clone() for weight in weights]
        ema.update(step + 1)
        assert all(torch.equal(weight, copy) for weight, copy in zip(weights, kept, strict=True))
        expected = [
            [0.9 * old + 0.1 * new for old, new in zip(average, weight.tolist(), strict=True)]
            for average, weight in zip(expected, kept, strict=True)
        ]
    for average, values in zip(ema.tensors, expected, strict=True):
        torch.testing.assert_close(average, torch.tensor(values), atol=1e-6, rtol=1e-6)
        assert not average.requires_grad


def test_the_ema_follows_weights_changed_in_place():
    weight = torch.zeros(2)
    ema = EMA([weight], decay=0.5)
    weight.fill_(8)
    ema.update(1)
    assert ema.tensors[0].tolist() == [4, 4] and weight.tolist() == [8, 8]


def test_every_precision_of_the_config_is_defined():
    assert set(MODES) == set(typing.get_args(typing.get_type_hints(TrainConfig)["precision"]))
    assert {name: mode.compute for name, mode in MODES.items()} == {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "tf32": torch.float32,
        "fp32": torch.float32,
    }


@pytest.mark.parametrize(("mode", "matmul"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "high")])
def test_the_matmul_mode_of_a_precision_is_set(mode, matmul):
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = matmul == "highest"
        apply_matmul_mode(mode)
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 == (matmul == "high")  # cuDNN's own switch
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


FIELDS = ("loss", "lr", "grad_norm", "images_per_s", "step_s", "data_wait_s", "memory_gb", "epoch")


def values(step: int) -> dict[str, float]:
    return {name: step + at / 16 for at, name in enumerate(FIELDS)}


def log(run, start: int, until: int, steps: int = 40) -> None:
    with Metrics(run, start, steps) as metrics:
        for step in range(start + 10, until + 1, 10):
            metrics.advance(step)
            metrics.log(step, values(step))


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_every_value(tmp_path):
    log(tmp_path, 0, 20)
    assert lines(tmp_path) == [{"step": 10, **values(10)}, {"step": 20, **values(20)}]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with Metrics(tmp_path, 0, 40) as metrics:
        metrics.log(10, values(10))
        assert len(lines(tmp_path)) == 1


def test_a_resumed_run_drops_what_was_logged_after_its_checkpoint(tmp_path):
    log(tmp_path, 0, 30)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # a crash while writing
    log(tmp_path, 20, 40)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 40]
    assert lines(tmp_path)[2] == {"step": 30, **values(30)}


def test_a_torn_last_line_is_dropped_also_where_all_others_stay(tmp_path):
    log(tmp_path, 0, 20)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 1')
    log(tmp_path, 20, 20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]


def test_lines_after_one_that_cannot_be_read_stay(tmp_path):
    log(tmp_path, 0, 30)
    first, _, third = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(f"{first}garbage\n{third}")
    log(tmp_path, 30, 40)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert kept[1] == "garbage" and [line["step"] for line in read_log(tmp_path)] == [10, 30, 40]


def test_off_a_terminal_each_logging_step_is_a_plain_line(tmp_path, capsys):
    log(tmp_path, 0, 20)
    out = capsys.readouterr().out
    first, second = out.splitlines()
    assert "\x1b" not in out
    for part in ("step 10/40", "loss 10.0000", "lr 1.01e+01", "grad norm 10.125", "10 images/s", "data wait 10.312 s/step"):
        assert part in first
    assert f"ETA {30 * 10.25:.0f} s" in first and "step 20/40" in second


def test_tensorboard_reads_the_values(tmp_path):
    log(tmp_path, 0, 30)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in FIELDS}
    for name in FIELDS:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(step, pytest.approx(values(step)[name])) for step in (10, 20, 30)]


def test_tensorboard_forgets_what_a_resumed_run_logs_again(tmp_path):
    log(tmp_path, 0, 30)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0000000001.host.1.0"))  # surely before the second
    log(tmp_path, 20, 40)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20, 30, 40]


def fill(disk) -> Path:
    """All that is left of it."""
    with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return disk / "others"


@pytest.mark.parametrize("back", [False, True])
def test_what_a_full_disk_does_not_take_is_written_later(small_disk, capsys, back):
    disk = small_disk("200k")
    with Metrics(disk, 0, 500) as metrics:
        metrics.log(10, values(10))
        others = fill(disk)
        for step in range(20, 410, 10):  # more than what is left of a block of the file
            metrics.log(step, values(step))
        assert len(lines(disk)) < 40
        if back:
            metrics.go_back(380)
        others.unlink()
        if back:
            metrics.log(390, values(390))
        metrics.log(500, values(500))
    steps = [*range(10, 400 if back else 410, 10), 500]
    assert [line["step"] for line in lines(disk)] == steps and lines(disk)[4] == {"step": 50, **values(50)}
    found = EventAccumulator(str(disk / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in found] == steps
    out = capsys.readouterr().out
    assert out.count("metrics cannot be written, buffering them: ") == 1 and out.count("metrics are written again") == 1
    assert "lost" not in out


def test_a_picture_that_a_disk_takes_half_of_hides_nothing_that_comes_later(small_disk, capsys):
    disk = small_disk("200k")
    (disk / "others").write_bytes(bytes(50_000))
    with Metrics(disk, 0, 40) as metrics:
        metrics.log(10, values(10))
        metrics.show(10, {"samples": bytes(300_000)}, {})
        (disk / "others").unlink()
        metrics.log(20, values(20))
    assert "samples and metrics of step 10 are not written to TensorBoard: " in capsys.readouterr().out
    events = EventAccumulator(str(disk / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [10, 20]


def test_what_is_left_of_a_disk_is_enough_for_what_waits(small_disk):
    disk = small_disk("400k")
    with Metrics(disk, 0, 30000) as metrics:
        for step in range(10, 4010, 10):  # 65 KB of log
            metrics.log(step, values(step))
        others = fill(disk)
        for step in range(4010, 4200, 10):
            metrics.log(step, values(step))
        os.truncate(others, others.stat().st_size - 24576)
        metrics.log(4200, values(4200))
        assert [line["step"] for line in lines(disk)] == list(range(10, 4210, 10))
    assert sorted(path.name for path in disk.iterdir()) == ["metrics.jsonl", "others", "tensorboard"]


@pytest.mark.parametrize("method", ["write", "close"])
def test_no_error_of_a_file_ends_the_run(tmp_path, monkeypatch, capsys, method):
    exact, failing = getattr(metrics_module._File, method), [False]

    def fails(self, *arguments):
        if failing[0]:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return exact(self, *arguments)

    with Metrics(tmp_path, 0, 40) as metrics:
        metrics.log(10, values(10))
        monkeypatch.setattr(metrics_module._File, method, fails)
        failing[0] = True
        metrics.log(20, values(20))
        metrics.go_back(10)
        metrics.log(20, values(20))
        failing[0] = False
        metrics.go_back(10)
        failing[0] = True
    said = capsys.readouterr().out
    assert [line["step"] for line in lines(tmp_path)] == [10] and "lost" not in said
    assert said.count("metrics cannot be written") == said.count("metrics are written again") == (method == "write")


def test_what_can_never_be_written_is_counted(small_disk, capsys):
    disk = small_disk("200k")
    with Metrics(disk, 0, 300) as metrics:
        metrics.log(10, values(10))
        fill(disk)
        for step in range(20, 310, 10):
            metrics.log(step, values(step))
    kept = len(lines(disk))
    assert 0 < kept < 30 and f"metrics of the last {30 - kept} logged steps are lost" in capsys.readouterr().out


def test_no_thread_outlives_the_run(tmp_path):
    before = threading.active_count()
    log(tmp_path, 0, 20)
    assert threading.active_count() == before


def test_memory_is_that_of_this_process():
    found = memory_gb(torch.device("cpu"))
    assert 0.05 < found < 1000  # importing torch alone takes more than 50 MB
