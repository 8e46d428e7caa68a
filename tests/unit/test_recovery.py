"""The guard's decisions carried out on one process: attempts, snapshots, roll backs."""

import math
from dataclasses import replace

import pytest
import torch

from tests.conftest import random_batch
from tests.unit.guarded_run import NAN, Guarded, gradients
from xar_scale import dist
from xar_scale.checkpoint.manifest import newest_valid
from xar_scale.config import GuardConfig
from xar_scale.data.order import Position
from xar_scale.errors import NonFiniteError
from xar_scale.guard import Action, Bad, GuardState
from xar_scale.precision import MODES
from xar_scale.snapshots import Snapshots


def test_a_retry_equals_the_first_attempt_bitwise(tmp_path, monkeypatch):
    run, undisturbed = Guarded(tmp_path, "model.dropout=0.2"), Guarded(tmp_path / "other", "model.dropout=0.2")
    run.spoil(monkeypatch, 1)
    resolved, expected = run.resolve(), undisturbed.resolve()
    assert resolved == expected and resolved.action is Action.STEP and not resolved.verdict.bad
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(run), gradients(undisturbed), strict=True))
    assert run.recovery.state == GuardState(transients=1, discarded=1)


@pytest.mark.parametrize(
    ("failing", "observed"), [pytest.param(1, [False, False], marks=pytest.mark.long), (2, [False, False, True, False])]
)
def test_compiled_blocks_are_retried_compiled_before_they_are_observed(tmp_path, monkeypatch, failing, observed):
    """Observed blocks are not compiled: dropout and rounding differ, and a failure that depends on them would vanish."""
    run = Guarded(tmp_path, "train.precision=bf16", "kernels.compile=true")
    run.spoil(monkeypatch, failing, when=lambda engine: not hooked(engine))
    attempt, seen = run.engine.attempt, []
    monkeypatch.setattr(run.engine, "attempt", lambda *of: seen.append(hooked(run.engine)) or attempt(*of))
    resolved = run.resolve()
    assert seen == observed and resolved.action is Action.STEP and not resolved.verdict.bad
    assert run.engine.mode == ("bf16" if failing == 1 else "tf32")


def hooked(engine) -> bool:
    return any(module._forward_hooks for module in engine.model.modules())


def test_a_step_taken_in_tf32_equals_that_of_a_tf32_run(tmp_path, monkeypatch):
    run, exact = Guarded(tmp_path, "train.precision=bf16"), Guarded(tmp_path / "exact", "train.precision=tf32")
    run.spoil(monkeypatch, 99, when=lambda engine: engine.mode == "bf16")
    assert run.resolve() == exact.resolve()
    assert run.engine.mode == "tf32" and run.recovery.state.held_until == 5 + 1 + GuardConfig().hold_steps
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(run), gradients(exact), strict=True))
    assert [attempt["mode"] for attempt in run.report()["attempts"]] == ["bf16", "bf16", "tf32"]


def test_the_precision_returns_when_the_hold_is_over(tmp_path, monkeypatch, capsys):
    run = Guarded(tmp_path, "train.precision=bf16", "guard.hold_steps=2")
    run.spoil(monkeypatch, 2)
    modes = []
    for step in range(5):
        run.resolve(step=step)
        modes.append(run.engine.mode)
        run.engine.discard()
    assert modes == ["tf32"] * 3 + ["bf16"] * 2
    assert "guard: step 3: computing in bf16\n" in capsys.readouterr().out


def test_in_the_fallback_micro_batches_run_in_parts(tmp_path, monkeypatch):
    run = Guarded(tmp_path, "train.precision=bf16", splits=4)
    run.spoil(monkeypatch, 2)
    sizes = []
    exact = run.engine._loss
    monkeypatch.setattr(run.engine, "_loss", lambda batch: sizes.append(len(batch.labels)) or exact(batch))
    resolved = run.resolve()
    assert sizes == [8, 8, 2, 2, 2, 2] and resolved.action is Action.STEP
    whole = Guarded(tmp_path / "whole", "train.precision=tf32")
    expected = whole.resolve()
    assert resolved.verdict.loss == pytest.approx(expected.verdict.loss, rel=1e-6)
    assert resolved.verdict.grad_norm == pytest.approx(expected.verdict.grad_norm, rel=1e-5)


def test_the_loss_scale_is_the_guards_and_leaves_no_trace_in_the_step(tmp_path):
    run, exact = Guarded(tmp_path, "train.precision=fp16"), Guarded(tmp_path / "exact", "train.precision=fp32")
    run.recovery.state = replace(run.recovery.state, scale=2.0**10)
    ours, theirs = run.resolve(), exact.resolve()
    assert run.engine.loss_scale == 2**10 and exact.engine.loss_scale == 1
    assert ours.verdict.loss == pytest.approx(theirs.verdict.loss, rel=1e-2)
    assert ours.verdict.grad_norm == pytest.approx(theirs.verdict.grad_norm, rel=1e-2)
    scaled, plain = (gradients(of)[3].norm().item() for of in (run, exact))
    assert scaled == pytest.approx(2**10 * plain, rel=2e-2)
    for guarded, resolved in ((run, ours), (exact, theirs)):
        guarded.engine.step(1e-3, resolved.verdict)
    for one, other in zip(run.engine.shards(), exact.engine.shards(), strict=True):
        assert (one.exp_avg - other.exp_avg).norm() < 0.05 * other.exp_avg.norm() + 1e-9


def test_a_scale_that_overflows_is_halved_and_no_report_is_written(tmp_path):
    run = Guarded(tmp_path, "train.precision=fp16")
    run.recovery.state = replace(run.recovery.state, scale=2.0**24)
    resolved = run.resolve()
    assert resolved.action is Action.STEP and math.isfinite(resolved.verdict.grad_norm)
    assert run.recovery.state.scale < 2**24 and run.recovery.state.transients == 0
    assert not (tmp_path / "reports").exists()


def test_non_finite_weights_are_found_before_a_step_uses_them(tmp_path):
    run = Guarded(tmp_path)
    run.recovery.check_start(0)
    next(s for s in run.engine.shards() if s.name == "class_embed.weight").master[-1] = NAN  # no sample of the batch uses it
    batch = replace(random_batch(0), labels=torch.zeros(8, dtype=torch.int64))
    verdict = run.recovery.attempt(0, [batch])
    assert verdict.bad == Bad.WEIGHTS and math.isfinite(verdict.loss)
    assert run.recovery.resolve(0, [batch], verdict).action is Action.ROLL_BACK


def test_when_a_step_fails_moments_are_checked_before_any_retry(tmp_path, monkeypatch):
    run = Guarded(tmp_path)
    run.train(1)
    run.recovery.check_start(1)
    next(run.engine.shards()).exp_avg_sq[0] = NAN
    run.spoil(monkeypatch, 1)
    assert run.resolve().action is Action.ROLL_BACK
    assert run.recovery.state == GuardState(rollbacks=1, discarded=1)


def test_rolling_back_restores_everything_bitwise(tmp_path):
    run = Guarded(tmp_path)
    run.train(3)
    run.recovery.state = replace(run.recovery.state, skipped=1)
    before, steps = run.state(), [state["step"].item() for state in run.engine.optimizer.state.values()]
    assert set(steps) == {3}
    run.recovery.check_start(4)  # three taken, one skipped
    run.train(2)
    run.recovery.state = replace(run.recovery.state, skipped=2)
    assert run.recovery.roll_back() == 4
    assert run.recovery.state.skipped == 1
    assert all(torch.equal(now, then) for now, then in zip(run.state(), before, strict=True))
    assert {state["step"].item() for state in run.engine.optimizer.state.values()} == {3}


def test_rolls_back_to_the_newest_snapshot_or_checkpoint_and_uses_each_snapshot_once(tmp_path):
    run = Guarded(tmp_path, "guard.snapshots=2", "guard.snapshot_every=1")
    for _ in range(4):
        assert run.recovery.check_and_snapshot(run.step, checkpoint_due=False)
        if run.step == 2:
            run.save()
        run.train(1)
    assert [snapshot.step for snapshot in run.recovery.snapshots.ring] == [2, 3]
    assert [run.recovery.roll_back() for _ in range(3)] == [3, 2, 2]  # the last from the checkpoint
    run.recovery.check_start(1)
    assert run.recovery.roll_back() == 2  # never to before a checkpoint


def test_of_a_snapshot_and_a_checkpoint_of_one_step_the_snapshot_is_used(tmp_path, capsys):
    run = Guarded(tmp_path)
    run.train(1)
    run.save()
    run.recovery.check_start(1)
    assert run.recovery.roll_back() == 1 and "rolled back to step 1, from host memory" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_skipped_for_an_older_snapshot(tmp_path):
    run = Guarded(tmp_path)
    run.train(3)
    run.recovery.check_start(3)
    run.train(1)
    (run.save() / "manifest.json").write_text("{")
    assert run.recovery.roll_back() == 3
    with pytest.raises(NonFiniteError, match="no snapshot or checkpoint to roll back to"):
        run.recovery.roll_back()


def test_skipped_steps_are_not_counted_as_taken_after_a_roll_back(tmp_path):
    run = Guarded(tmp_path)
    run.train(3)
    remembered = GuardState(skipped=1, losses=(1.0,), grad_norms=(2.0,))
    run.recovery.state = remembered
    run.recovery.check_and_snapshot(100, checkpoint_due=False)
    position = Position(0, 32)
    run.store.save(run.manifest(step=4, position=position, quarantined=[("a", 3)], guard=remembered))
    run.store.finish()
    manifest = newest_valid(tmp_path).manifest
    assert manifest.quarantined == [("a", 3)] and manifest.guard == remembered
    for step in (100, 4):
        run.recovery.state = GuardState(rollbacks=1, skipped=7)
        assert run.recovery.roll_back() == step
        assert run.recovery.state == replace(remembered, rollbacks=1)
        assert {state["step"].item() for state in run.engine.optimizer.state.values()} == {step - 1}


def test_a_run_does_not_start_with_a_non_finite_state(tmp_path):
    run = Guarded(tmp_path)
    run.ema.tensors[3][0] = NAN
    with pytest.raises(NonFiniteError, match="the initial weights, moments or EMA weights are not finite on rank 0"):
        run.recovery.check_start(0)
    off = Guarded(tmp_path, "guard.enabled=false")
    off.ema.tensors[3][0] = NAN
    off.recovery.check_start(0)
    assert off.recovery.check_and_snapshot(100, checkpoint_due=True) and not off.recovery.snapshots.ring


def test_ema_weights_are_checked_when_a_step_fails(tmp_path, monkeypatch):
    run = Guarded(tmp_path)
    run.recovery.check_start(0)
    run.ema.tensors[3][0] = NAN
    run.spoil(monkeypatch, 1)
    assert run.resolve().action is Action.ROLL_BACK


def test_compute_weights_are_refreshed_from_the_shards_before_a_retry(tmp_path, monkeypatch):
    run = Guarded(tmp_path)
    told = []
    monkeypatch.setattr(run.engine, "shards_written", told.append)
    run.recovery.state = GuardState(skipped=2)
    run.spoil(monkeypatch, 1)
    run.resolve()
    assert told == [3]


def test_without_a_state_to_roll_back_to_the_run_ends(tmp_path):
    run = Guarded(tmp_path, "guard.snapshots=0")
    run.recovery.check_start(0)
    with pytest.raises(NonFiniteError, match="no snapshot or checkpoint to roll back to"):
        run.recovery.roll_back()


@pytest.mark.parametrize("which", ["master", "exp_avg", "exp_avg_sq", "average"])
def test_a_non_finite_state_is_neither_snapshotted_nor_saved(tmp_path, which):
    run = Guarded(tmp_path, "guard.snapshot_every=2")
    run.train(2)
    shard = list(run.engine.shards())[7]
    (run.ema.tensors[7] if which == "average" else getattr(shard, which))[0] = float("inf")
    assert run.recovery.check_and_snapshot(1, checkpoint_due=False)  # neither is due
    assert not run.recovery.check_and_snapshot(2, checkpoint_due=False)
    assert not run.recovery.check_and_snapshot(1, checkpoint_due=True)
    assert len(run.recovery.snapshots.ring) == 0
    assert run.recovery.state == GuardState(rollbacks=2)  # steps that were taken: no attempt was discarded


def test_snapshots_reuse_their_memory(tmp_path):
    run = Guarded(tmp_path)
    snapshots = Snapshots(run.engine, run.ema, GuardConfig(snapshots=2))
    seen = set()
    for step in range(6):
        snapshots.take(step, GuardState())
        seen |= {snapshot.staged.copies[0].data_ptr() for snapshot in snapshots.ring}
    assert len(seen) == 2 and [snapshot.step for snapshot in snapshots.ring] == [4, 5]
    snapshots.restore()
    snapshots.take(6, GuardState())
    assert {snapshot.staged.copies[0].data_ptr() for snapshot in snapshots.ring} == seen


def test_a_skipped_spike_leaves_the_state_and_is_counted(tmp_path):
    run = Guarded(tmp_path, "guard.spike=5", "guard.spike_window=3", "train.precision=bf16")
    for step in range(3):
        resolved = run.resolve(random_batch(1), step)
        run.engine.discard()
        assert resolved.action is Action.STEP
    before, loud = run.state(), random_batch(1)
    loud = replace(loud, latents=loud.latents * 50)
    assert run.resolve(loud, 3).action is Action.SKIP
    assert run.recovery.state.skipped == 1 and gradients(run) == []
    assert all(torch.equal(now, then) for now, then in zip(run.state(), before, strict=True))
    assert run.resolve(random_batch(1), 4).action is Action.STEP and run.engine.mode == "bf16"


def test_only_non_finite_samples_are_suspects(tmp_path):
    run = Guarded(tmp_path)
    batch = random_batch(0)
    batch.latents[3, 0, 1, 1] = float("inf")
    batch.noise[6, 2, 1] = NAN
    batch.t[7, 0] = NAN
    batch.places[6] = batch.places[3]
    assert run.resolve(batch).action is Action.QUARANTINE
    assert run.recovery.suspects == [(0, 3), (0, 7)] and run.recovery.state.quarantined == 2


def test_suspects_are_those_of_all_ranks(tmp_path, monkeypatch):
    run, batch, others = Guarded(tmp_path), random_batch(0), []
    monkeypatch.setattr(dist, "gather_objects", lambda ours: [ours, others.pop(0)])
    others[:] = [[[2, 7]]]
    assert run.recovery._suspects([batch], Bad.INPUT) == [(2, 7)]  # only the other rank's is not finite
    others[:] = [[], [[2, row] for row in range(8)]]
    assert run.recovery._suspects([batch], Bad.GRADIENT) == [(shard, row) for shard in (0, 2) for row in range(8)]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("held", [False, True])
def test_samples_whose_own_loss_overflows_are_found(tmp_path, precision, held):
    run = Guarded(tmp_path, f"train.precision={precision}")
    run.recovery.state = GuardState(lowered=held and MODES[precision].fallback is not None)
    batch = random_batch(0)
    batch.latents[5] = 1e25  # finite, but not its square
    assert run.resolve(batch).action is Action.QUARANTINE
    assert run.recovery.suspects == [(0, 5)]
    run.recovery.attempt(5, [random_batch(0)])
    assert run.engine.mode == ("tf32" if run.recovery.state.lowered else precision)


def test_where_no_sample_stands_out_all_are_suspects(tmp_path, monkeypatch):
    run = Guarded(tmp_path, "train.precision=fp32")
    exact = run.engine.agree
    monkeypatch.setattr(run.engine, "agree", lambda *of: (next(iter(run.engine.gradients())).fill_(NAN), exact(*of))[1])
    assert run.resolve().action is Action.QUARANTINE
    assert run.recovery.suspects == [(0, row) for row in range(8)]


def test_beyond_the_last_rung_one_line_reports_everything(tmp_path, monkeypatch):
    run = Guarded(tmp_path, "guard.max_quarantined=0")
    run.train(1)
    saved = run.save()
    run.spoil(monkeypatch, 99)
    with pytest.raises(NonFiniteError) as caught:
        run.resolve()
    said = str(caught.value)
    assert said.startswith(
        "step 5 cannot be taken: samples to quarantine: 8, guard.max_quarantined 0 leaves 0; traced to rank 0"
    )
    assert f"the newest checkpoint, {saved}, is finite; xar-scale replay {tmp_path}/reports/step-00000005.json" in said
    assert caught.value.exit_code == 70 and "\n" not in said and gradients(run) == []
