"""Power-function EMAs in training: in checkpoints, snapshots, rollbacks and the check for non-finite values."""

import math
import os
from dataclasses import replace

import pytest
import torch

from tests.conftest import digits_config
from tests.unit.guarded_run import Guarded
from tests.unit.tiny_run import Run, same
from xar_scale.checkpoint import store
from xar_scale.checkpoint.load import check_resumable, load, load_weights
from xar_scale.checkpoint.manifest import KINDS, checkpoint_paths, newest_valid, read_manifest, verify
from xar_scale.checkpoint.vectors import open_vectors
from xar_scale.cli import main
from xar_scale.ema import EMA, POWER_KINDS
from xar_scale.errors import ConfigError, NonFiniteError
from xar_scale.evaluate.digits import cache_digits
from xar_scale.guard import Action, GuardState
from xar_scale.memory.rank import MARGIN, rank_memory
from xar_scale.model.xar import meta_model
from xar_scale.recovery import Recovery, Resolution

ON = "optim.ema_snapshots_every=2"
CONFIG = digits_config("train.engine=single", "model.width=16", "model.heads=2", "train.global_batch=8", ON)


def test_the_first_update_takes_the_weights_and_later_ones_less_and_less():
    weight = torch.zeros(1)
    ema = EMA([weight], 0.9, [0.1])
    assert list(ema.averages) == ["ema", "ema-0.10"]
    seen = []
    for number in range(1, 4):
        weight.fill_(1.0 if number == 1 else 0.0)
        ema.update(number)
        seen.append(ema.averages["ema-0.10"][0].item())
    power = 7.94  # gamma + 1
    assert seen == pytest.approx([1, 0.5**power, (1 / 3) ** power], rel=2e-2)


def test_checkpoints_hold_them_and_a_resumed_run_continues_bitwise(tmp_path):
    run, other = Run(tmp_path, config=CONFIG), Run(tmp_path, seed=1, config=CONFIG)
    run.train(3)
    checkpoint = verify(run.save())
    assert checkpoint.manifest.kinds == ("model", "ema", "ema-0.05", "ema-0.10", "exp_avg", "exp_avg_sq")
    load(checkpoint, other.engine, other.ema)
    other.step = 3
    run.train(3)
    other.train(3)
    assert len(run.state()) == 6 * len(run.engine.shapes) and same(run.state(), other.state())


def test_an_unwritable_snapshot_folder_is_refused_at_the_start(tmp_path):
    """They are written first: without them a step's checkpoint would not be written either."""
    (tmp_path / "ema").touch()
    run = Run(tmp_path, config=CONFIG)
    with pytest.raises(OSError, match=f"{tmp_path}/ema"):
        run.store.open(0)
    Run(tmp_path).store.open(0)  # this run has no snapshots


def test_without_the_option_checkpoints_do_not_hold_them(tmp_path):
    run = Run(tmp_path)
    run.train()
    checkpoint = verify(run.save())
    assert checkpoint.manifest.kinds == KINDS and list(run.ema.averages) == ["ema"]
    with pytest.raises(ConfigError, match="ema_snapshots_every is 2, but .* holds no ema-0.05: these EMAs must start"):
        check_resumable(checkpoint, CONFIG, run.info)


def test_a_run_resumes_with_the_option_turned_off(tmp_path):
    run = Run(tmp_path, config=CONFIG)
    run.train(2)
    checkpoint, off = verify(run.save()), Run(tmp_path)
    check_resumable(checkpoint, off.config, off.info)
    load(checkpoint, off.engine, off.ema)
    assert same(off.ema.tensors, run.ema.averages["ema"])


def test_for_one_step_the_snapshot_is_written_before_the_checkpoint(tmp_path, capsys):
    written = []
    run = Run(tmp_path, config=CONFIG, keep_last=1)
    for _ in range(3):
        run.train()
        run.store.save(run.manifest(kinds=tuple(POWER_KINDS)), run.manifest())
        run.store.finish()
        paths = [tmp_path / folder / f"step-{run.step:08d}" / "manifest.json" for folder in ("ema", "checkpoints")]
        written.append([path.stat().st_mtime_ns for path in paths])
        assert "snapshot {} and checkpoint {}: done".format(*(path.parent for path in paths)) in capsys.readouterr().out
    assert all(snapshot < checkpoint for snapshot, checkpoint in written)
    assert sorted(os.listdir(tmp_path / "ema")) == ["step-00000001", "step-00000002", "step-00000003"]  # none is dropped
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["step-00000003"]
    assert run.store.newest == tmp_path / "checkpoints" / "step-00000003" and newest_valid(tmp_path).path == run.store.newest
    snapshot = verify(tmp_path / "ema" / "step-00000003")
    assert snapshot.manifest.kinds == ("ema-0.05", "ema-0.10")
    with open_vectors(snapshot) as files:
        assert {key.split("/")[0] for key in files.chunks} == {"ema-0.05", "ema-0.10"}
    for kind, averages in run.ema.averages.items():
        if kind != "ema":
            loaded = load_weights(snapshot, kind)
            for shard, average in zip(run.engine.shards(), averages, strict=True):
                assert torch.equal(loaded[shard.name], average.view(shard.shape))


def test_a_failed_snapshot_is_retried_and_the_checkpoint_follows(tmp_path, monkeypatch):
    run, exact, failures = Run(tmp_path, config=CONFIG), store.write_file, [OSError(28, "No space left on device")] * 2
    monkeypatch.setattr(store.time, "sleep", lambda _: None)

    def write(*arguments):
        if failures:
            raise failures.pop()
        return exact(*arguments)

    monkeypatch.setattr(store, "write_file", write)
    run.train()
    run.store.save(run.manifest(kinds=tuple(POWER_KINDS)), run.manifest())
    run.store.finish()
    verify(tmp_path / "ema" / "step-00000001")
    verify(tmp_path / "checkpoints" / "step-00000001")


def test_checkpoint_failed_is_true_for_checkpoints_and_not_for_snapshots(tmp_path, monkeypatch):
    run, failing, exact = Run(tmp_path, config=CONFIG), [True], store.write_file

    def write(*arguments):
        if failing[0]:
            raise OSError(28, "No space left on device")
        return exact(*arguments)

    monkeypatch.setattr(store, "write_file", write)
    snapshot = tuple(POWER_KINDS)
    for manifests, lacking in (([snapshot], False), ([run.manifest().kinds], True), ([snapshot, run.manifest().kinds], True)):
        run.train()
        run.store.save(*(run.manifest(kinds=kinds) for kinds in manifests))
        assert run.store.checkpoint_failed() is lacking
    failing[0] = False
    run.store.finish()
    assert not run.store.checkpoint_failed()


def test_snapshots_of_later_steps_are_set_aside_and_leftovers_removed(tmp_path):
    run = Run(tmp_path, config=CONFIG)
    for _ in range(2):
        run.train()
        run.store.save(run.manifest(kinds=tuple(POWER_KINDS)))
        run.store.finish()
    (tmp_path / "ema" / ".step-00000003.tmp").mkdir()
    run.store.open(1)
    assert sorted(os.listdir(tmp_path / "ema")) == ["step-00000001", "superseded-step-00000002"]
    run.store.save(run.manifest(kinds=tuple(POWER_KINDS)))
    run.store.finish()
    assert [path.name for path in checkpoint_paths(tmp_path, "ema")] == ["step-00000001", "step-00000002"]
    assert run.store.newest is None and not (tmp_path / "checkpoints" / "latest").exists()  # a snapshot is not a checkpoint


@pytest.mark.parametrize("kind", POWER_KINDS)
def test_the_guard_checks_them_and_rolls_them_back(tmp_path, kind, monkeypatch):
    run = Guarded(tmp_path, "guard.snapshot_every=2", ON)
    run.train(2)
    assert run.recovery.check_and_snapshot(2, checkpoint_due=False)
    before = run.state()
    run.train()
    run.ema.averages[kind][7][0] = math.nan
    assert not run.recovery.check_and_snapshot(3, checkpoint_due=True)
    run.recovery.roll_back()
    assert same(run.state(), before)
    run.ema.averages[kind][7][0] = math.nan
    with pytest.raises(NonFiniteError, match="the initial weights, moments or EMA weights are not finite"):
        run.recovery.check_start(2)
    run.spoil(monkeypatch, 1)
    assert run.resolve().action is Action.ROLL_BACK


def test_their_memory_is_estimated():
    off = replace(CONFIG, optim=replace(CONFIG.optim, ema_snapshots_every=None))
    device = torch.device("cpu")
    more = rank_memory(CONFIG, "fp32", 8, 1, device).total - rank_memory(off, "fp32", 8, 1, device).total
    weights = sum(parameter.numel() for parameter in meta_model(CONFIG.model).parameters())
    assert more == pytest.approx(MARGIN * 2 * 4 * weights)


@pytest.fixture
def words(tmp_path):
    """Arguments for 12 steps of training on one process, with a checkpoint every 4 and a snapshot every 5."""
    cache_digits(tmp_path / "data", 1000)
    small = ["train.engine=single", "train.steps=12", "optim.warmup_steps=1", "train.global_batch=8", "data.workers=0"]
    small += ["model.width=16", "model.heads=2", "train.checkpoint_every=4", "train.keep_last=9", "optim.ema_snapshots_every=5"]
    return ["train", "--recipe", "digits", f"data.path={tmp_path / 'data'}", *small, "--run-dir"]


def test_training_counts_updates_and_not_steps_across_a_resume(tmp_path, words, monkeypatch, capsys):
    """A skipped step is not an update; 8 and 4 steps equal 12, bitwise."""
    resolve, update, numbers = Recovery.resolve, EMA.update, []

    def skip_the_third(self, step, batches, verdict):
        if step != 2:
            return resolve(self, step, batches, verdict)
        self.engine.discard()
        self.state = replace(self.state, skipped=self.state.skipped + 1)
        return Resolution(Action.SKIP, verdict)

    monkeypatch.setattr(Recovery, "resolve", skip_the_third)
    monkeypatch.setattr(EMA, "update", lambda self, number: (numbers.append(number), update(self, number)))
    assert main([*words, str(tmp_path / "whole")]) == 0
    assert numbers == list(range(1, 12))
    numbers.clear()
    middle = tmp_path / "whole" / "checkpoints" / "step-00000008"
    assert main([*words, str(tmp_path / "resumed"), "--resume", str(middle)]) == 0
    assert numbers == [8, 9, 10, 11]
    for folder in ("checkpoints/step-00000012", "ema/step-00000010", "ema/step-00000012"):
        whole, resumed = (verify(tmp_path / run / folder) for run in ("whole", "resumed"))
        assert whole.manifest.updates == int(folder[-2:]) - 1 and "ema-0.05" in whole.manifest.kinds
        for kind in whole.manifest.kinds:
            ours, theirs = load_weights(resumed, kind), load_weights(whole, kind)
            assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert sorted(os.listdir(tmp_path / "whole" / "ema")) == ["step-00000005", "step-00000010", "step-00000012"]
    said, complaint = capsys.readouterr()
    assert len([line for line in said.splitlines() if line.startswith("snapshot") and "step-00000012: done" in line]) == 2
    assert complaint == ""


def test_no_run_resumes_from_a_snapshot(tmp_path, words, capsys):
    assert main([*words, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    snapshot = tmp_path / "whole" / "ema" / "step-00000010"
    for more in ([], ["optim.ema_snapshots_every=null"]):
        assert main([*words, str(tmp_path / "resumed"), *more, "--resume", str(snapshot)]) == 65
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"checkpoint {snapshot} holds ema-0.05, ema-0.10, but no" in error
    assert not (tmp_path / "resumed").exists()
    assert read_manifest(snapshot).manifest.guard == GuardState()
