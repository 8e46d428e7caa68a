"""How many parts a micro-batch is split into after a fallback, and that training splits it so."""

import dataclasses

import pytest
import torch

from tests.conftest import digits_config
from xar_scale import dist
from xar_scale.cli import main
from xar_scale.engines import Engine
from xar_scale.evaluate.digits import cache_digits
from xar_scale.guard import Bad
from xar_scale.memory import fallback, rank
from xar_scale.memory.fallback import plan_fallback
from xar_scale.memory.rank import rank_memory

CPU = torch.device("cpu")


# Memory of a micro-batch: 1 GB per sample in TF32, 0.5 GB in bf16; the state takes none
@pytest.fixture
def simple(monkeypatch):
    def needs(config, mode, samples, *_):
        gigabytes = samples * (0.5 if mode == "bf16" else 1)
        return rank.RankMemory(0, 0, 0, 0, activations=1e9 * gigabytes / rank.MARGIN)

    monkeypatch.setattr(fallback, "rank_memory", needs)

    def plan(room_gb: float, *overrides: str, micro: int = 64) -> tuple[int, str]:
        changes = (f"train.micro_batch={micro}", f"train.global_batch={2 * micro}", "data.lanes=1", *overrides)
        return plan_fallback(digits_config("train.precision=bf16", *changes), 2, CPU, room_gb * 1e9)

    return plan


@pytest.mark.parametrize(("room", "parts"), [(64, 1), (63.9, 2), (32, 2), (31.9, 4), (16, 4), (15.9, 8), (1, 64), (0.9, 64)])
def test_as_few_parts_as_fit(simple, room, parts):
    assert simple(room)[0] == parts


def test_the_warning_has_the_numbers(simple):
    assert simple(64) == (1, "")
    assert simple(40) == (
        2,
        "after a fallback TF32 needs about 64 GB of 40 GB: each micro-batch will run in 2 parts (micro_batch 64 as 2 x 32)",
    )
    parts, warning = simple(7, micro=12)
    assert parts == 2 and warning.endswith("(micro_batch 12 as 2 x 6)")
    parts, warning = simple(7.9, micro=15)
    assert parts == 3 and warning.endswith("(micro_batch 15 as 3 x 5)")


def test_there_is_a_warning_if_a_single_sample_does_not_fit(simple):
    parts, warning = simple(0.7, micro=1)
    assert (parts, warning) == (
        1,
        "after a fallback TF32 needs about 1.0 GB of 0.7 GB, and 1.0 GB even for one sample: it may run out of memory",
    )


def test_there_is_no_warning_if_the_run_s_own_precision_does_not_fit(simple):
    parts, warning = simple(31)
    assert (parts, warning) == (4, "")


@pytest.mark.parametrize("without", ["train.precision=tf32", "train.precision=fp32", "guard.enabled=false"])
def test_runs_that_never_fall_back_estimate_nothing(simple, without, monkeypatch):
    monkeypatch.setattr(fallback, "rank_memory", None)
    assert simple(0.1, without) == (1, "")


def test_the_rank_with_the_least_memory_decides(simple, monkeypatch, capsys):
    gathered = []
    monkeypatch.setattr(dist, "gather_objects", lambda value: gathered.append(value) or [50 * 10**9, 33 * 10**9])
    monkeypatch.setattr(dist, "on_rank_0", lambda work: work())
    config = digits_config("train.precision=bf16", "train.micro_batch=64")
    assert fallback.fallback_splits(config, CPU) == 2
    assert gathered == [fallback.device_memory(CPU)]
    assert capsys.readouterr().out.startswith("memory: after a fallback TF32 needs about 64 GB of 33 GB")


def test_a_machines_memory_is_shared_by_its_ranks(monkeypatch):
    whole = fallback.device_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fallback.device_memory(CPU) == whole // 4


def test_a_failed_estimate_does_not_end_the_run(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no such\noperation")

    monkeypatch.setattr(fallback, "rank_memory", fail)
    assert fallback.fallback_splits(digits_config("train.precision=bf16"), CPU) == 1
    said = capsys.readouterr().out
    assert "cannot estimate the memory after a fallback (RuntimeError: no such operation)" in said and said.count("\n") == 1


@pytest.mark.parametrize("little", [False, True])
def test_training_splits_the_fallback_as_estimated(tmp_path, monkeypatch, capsys, little):
    """A run in which every bf16 step fails. The warning is printed once, and only if TF32 does not fit."""
    cache_digits(tmp_path / "data", 1000)
    settings = ["train.engine=single", "train.precision=bf16", "train.steps=2", "train.global_batch=128"]
    settings += ["optim.warmup_steps=1", "data.workers=0"]
    arguments = ["train", "--recipe", "digits", "--run-dir", str(tmp_path / "run"), f"data.path={tmp_path / 'data'}", *settings]
    config = digits_config(*settings)
    need = {size: rank_memory(config, "tf32", size, 1, CPU).total for size in (64, 128)}
    room = (need[64] + 2 * need[128]) / 3
    monkeypatch.setattr(fallback, "device_memory", lambda device: room if little else 2 * need[128])
    attempt, seen = Engine.attempt, []

    def failing_in_bf16(engine, *arguments):
        verdict = attempt(engine, *arguments)
        seen.append((engine.mode, engine.splits))
        return dataclasses.replace(verdict, bad=Bad.GRADIENT) if engine.mode == "bf16" else verdict

    monkeypatch.setattr(Engine, "attempt", failing_in_bf16)
    assert main(arguments) == 0
    assert dict(seen) == {"bf16": 1, "tf32": 2 if little else 1}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory:")]
    assert len(said) == little
    assert not little or said[0].endswith("each micro-batch will run in 2 parts (micro_batch 128 as 2 x 64)")
