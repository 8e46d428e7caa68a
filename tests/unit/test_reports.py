"""Where a forward-backward pass breaks, what a report holds, and its replay."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import random_batch
from tests.unit.guarded_run import NAN, Guarded
from xar_scale import reports
from xar_scale.cli import main
from xar_scale.diagnosis import Activations, Watch
from xar_scale.engines import Verdict
from xar_scale.errors import DataError, UsageError
from xar_scale.guard import Action, Bad, Decision, Event
from xar_scale.model.layers import Block
from xar_scale.replay import Replayed, find_checkpoint, replay


def test_a_watch_names_the_first_module_forward_and_backward(tmp_path):
    run = Guarded(tmp_path)
    model = run.engine.model
    spoil = model.decoder[0].mlp.up.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    with Watch(model) as watch, Activations(model) as activations:
        run.engine.attempt(0, [random_batch(0)])
    assert (watch.forward, watch.backward) == ("decoder.0.mlp.up", "out_proj")
    assert math.isfinite(activations.largest["encoder.1"]) and not math.isfinite(activations.largest["decoder.0"])
    spoil.remove()
    spoil = model.encoder[1].register_forward_hook(
        lambda module, inputs, output: output.register_hook(lambda gradient: gradient * NAN) and None
    )
    with Watch(model) as watch:
        run.engine.attempt(0, [random_batch(0)])
    assert (watch.forward, watch.backward) == (None, "encoder.1")
    spoil.remove()
    run.engine.discard()
    with Watch(model) as watch, Activations(model) as activations:
        run.engine.attempt(0, [random_batch(0)])
    assert watch.forward is watch.backward is None
    assert list(activations.largest) == [name for name, module in model.named_modules() if isinstance(module, Block)]
    assert not any(module._forward_hooks for module in model.modules())


def test_the_largest_activation_is_the_blocks_own(tmp_path):
    run = Guarded(tmp_path)
    seen = []
    hook = run.engine.model.encoder[0].register_forward_hook(lambda *of: seen.append(of[-1].abs().max().item()))
    with Activations(run.engine.model) as activations:
        run.engine.attempt(0, [random_batch(0), random_batch(1)])
    hook.remove()
    assert len(seen) == 2 and activations.largest["encoder.0"] == max(seen)


def test_a_report_holds_findings_attempts_decisions_and_the_batch(tmp_path, monkeypatch):
    run = Guarded(tmp_path, "train.precision=bf16")
    run.spoil(monkeypatch, 2)
    batch = random_batch(5)
    run.resolve(batch)
    report = run.report()
    assert (report["step"], report["culprits"], report["newest_checkpoint"]) == (5, [0], None)
    assert [(a["mode"], a["bad"], a["action"]) for a in report["attempts"]] == [
        ("bf16", ["loss", "gradient"], "retry"),
        ("bf16", ["loss", "gradient"], "retry"),
        ("tf32", [], "step"),
    ]
    (rank,) = report["ranks"]
    assert rank["bad"] == ["loss", "gradient"] and rank["backward"] == "out_proj"
    assert set(rank["activations"]) == {"encoder.0", "encoder.1", "decoder.0", "decoder.1"}
    sample = report["samples"][3]
    assert (sample["key"], sample["shard"], sample["position"]) == ("3", "a", 3)
    assert sample["t"] == pytest.approx(batch.t[3].tolist())
    assert sample["latent_norm"] == pytest.approx(batch.latents[3].norm().item())
    kept = load_file(tmp_path / "reports" / report["batch"]["file"])
    for name in ("latents", "labels", "t", "noise", "places"):
        assert torch.equal(kept[name], getattr(batch, name)), name
    assert run.config.to_dict() == report["config"]


def test_reports_of_one_step_do_not_overwrite_each_other_and_a_full_disk_ends_nothing(tmp_path, monkeypatch, capsys):
    run = Guarded(tmp_path)
    for _ in range(2):
        run.spoil(monkeypatch, 1)
        run.resolve()
    assert sorted(path.name for path in (tmp_path / "reports").glob("*.json")) == ["step-00000005.1.json", "step-00000005.json"]

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reports, "write_atomically", full)
    run.spoil(monkeypatch, 1)
    assert run.resolve().action is Action.STEP
    said = capsys.readouterr().out
    assert "step-00000005.2.json: No space left on device" in said and "report" not in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("ranks", "culprits"),
    [
        ([dict(bad=["loss"]), dict(bad=[])], [0]),
        ([dict(bad=["gradient"]), dict(bad=["gradient"], backward="x")], [1]),
        ([dict(bad=["gradient"], backward="y"), dict(bad=["gradient"], forward="x", backward="x")], [1]),
        ([dict(bad=["loss", "weights"]), dict(bad=["loss"])], [0]),
        ([dict(bad=["loss"]), dict(bad=["loss", "input"])], [1]),
        ([dict(bad=["gradient"]), dict(bad=["gradient"])], []),
    ],
)
def test_the_culprit_is_the_rank_on_which_it_started(ranks, culprits):
    made = [reports.RankReport(rank, "host", "CPU 0", **values) for rank, values in enumerate(ranks)]
    assert [rank.rank for rank in reports._culprits(made)] == culprits


def test_a_replay_reproduces_the_failure(tmp_path, capsys):
    run = Guarded(tmp_path, "train.precision=bf16")
    run.train(2)
    run.save()
    batch = random_batch(9)
    batch.latents[5] = 1e25
    run.resolve(batch)
    path = tmp_path / "reports" / "step-00000005.json"
    assert main(["replay", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "bf16: not finite: loss and gradient; retry, the same batch in the same precision" in shown
    assert "with the weights after 2 steps" in shown and shown.endswith("reproduced\n") and "not reproduced" not in shown
    assert shown.count("first output that is not finite") == 2 and "\n  tf32: loss inf" in shown


def test_a_replay_uses_the_ranks_dropout_its_loss_scale_and_the_newest_weights_before(tmp_path):
    run = Guarded(tmp_path, "train.precision=fp16", "model.dropout=0.3")
    run.engine.rank = 3
    run.train(5)
    run.save()  # at the step that fails
    run.engine.loss_scale = 2.0**30  # which overflows
    batch = random_batch(5)
    verdict = run.engine.attempt(5, [batch])
    assert verdict.bad == Bad.GRADIENT
    report = reports.Report(run.config, run.engine, ["a"], tmp_path, 5, [batch])
    report.add("fp16", 2.0**30, Event(5, verdict.bad, verdict.loss, verdict.grad_norm), Decision(Action.SKIP, "for a test"))
    report.write(None)
    run.engine.discard()
    run.engine.loss_scale = 1.0
    run.train(1)
    run.save()
    recorded = reports.read(tmp_path / "reports" / "step-00000005.json")
    checkpoint = find_checkpoint(recorded)
    assert checkpoint.manifest.step == 5
    first, second = replay(replace(recorded, rank=3), checkpoint, torch.device("cpu"))
    assert (first.mode, first.verdict.loss, first.verdict.bad) == ("fp16", verdict.loss, Bad.GRADIENT)
    assert (second.mode, second.verdict.bad) == ("tf32", Bad.NOTHING)
    other, _ = replay(recorded, checkpoint, torch.device("cpu"))
    assert other.verdict.loss != verdict.loss


@pytest.fixture
def met(tmp_path, monkeypatch):
    """The report of a failed step."""
    run = Guarded(tmp_path / "run")
    run.save()
    run.spoil(monkeypatch, 1)
    run.resolve()
    return tmp_path / "run" / "reports" / "step-00000005.json"


def test_a_report_is_replayed_from_within_its_own_folder(met, monkeypatch):
    monkeypatch.chdir(met.parent)
    assert find_checkpoint(reports.read(Path(met.name))).path.parent == met.parent.parent / "checkpoints"


def test_a_replay_shows_a_non_finite_activation_as_the_largest(met, capsys, monkeypatch):
    verdict = Verdict(1.0, 1.0, Bad.NOTHING, faults=0, stop=False)
    blocks = {"a": 3.0, "b": math.nan, "c": 5.0}
    monkeypatch.setattr("xar_scale.replay.replay", lambda *_: iter([Replayed("fp32", verdict, None, None, blocks)]))
    main(["replay", str(met)])
    assert "largest activation: nan, of b" in capsys.readouterr().out


def test_a_replay_takes_a_checkpoint_or_the_newest_valid_one_of_a_run(met, tmp_path, capsys):
    other = Guarded(tmp_path / "other")
    paths = [other.train(1) or other.save() for _ in range(2)]
    for path, step in ((paths[0], 1), (tmp_path / "other", 2)):
        assert main(["replay", str(met), "--checkpoint", str(path)]) == 0
        assert f"with the weights after {step} steps" in capsys.readouterr().out
    next(paths[1].glob("*.safetensors")).write_bytes(b"")
    assert main(["replay", str(met), "--checkpoint", str(tmp_path / "other")]) == 0
    assert "with the weights after 1 steps" in capsys.readouterr().out
    assert main(["replay", str(met), "--checkpoint", str(tmp_path)]) == 65


def test_a_replay_with_the_weights_of_another_model_says_what_differs(met, tmp_path, capsys):
    wider = Guarded(tmp_path / "wider", "model.width=32").save()
    assert main(["replay", str(met), "--checkpoint", str(wider)]) == 78
    said = f"report {met}: model.width is 16, checkpoint {wider} was made with 32"
    assert capsys.readouterr().err == f"xar-scale: {said}\n"
    deeper = Guarded(tmp_path / "deeper", "model.depth_decoder=5")
    deeper.store.save(deeper.manifest(config={}))  # as if converted from another format
    deeper.store.finish()
    assert main(["replay", str(met), "--checkpoint", str(tmp_path / "deeper")]) == 65
    said = r"xar-scale: checkpoint \S+: decoder\.2\.\S+ is \[.*\], the model's is None\n"
    assert re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("attempts", 0, "mode"), "fp7"),
        (("attempts", 0, "mode"), 3),
        (("attempts", 0, "loss_scale"), "x"),
        (("attempts",), {}),
        (("attempts",), 3),
        (("batch", "passes"), 0),
        (("batch", "passes"), 7),
        (("batch", "passes"), -1),
        (("batch", "rank"), "x"),
        (("batch", "file"), 3),
        (("ranks",), [3]),
        (("step",), "x"),
        (("step",), -1),
        (("config",), 3),
        (("config", "model"), 3),
        (("config", "train", "steps"), list(range(10_000))),
    ],
)
def test_a_report_of_wrong_types_is_not_replayed(met, capsys, where, value):
    values = json.loads(met.read_text())
    at = values
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    met.write_text(json.dumps(values))
    assert main(["replay", str(met)]) == (78 if where[0] == "config" and where[1:] else 65)
    said = capsys.readouterr().err
    assert re.fullmatch(f"xar-scale: report {met}.*\n", said) and len(said) < 600


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("labels", lambda tensor: tensor * 0 + 99),
        ("labels", lambda tensor: tensor * 0 - 1),
        ("labels", lambda tensor: tensor.float()),
        ("labels", lambda tensor: tensor.bool()),
        ("latents", lambda tensor: tensor.half()),
        ("latents", lambda tensor: tensor[:, :1]),
        ("noise", lambda tensor: tensor.long()),
        ("t", lambda tensor: tensor[:, :1]),
        ("t", lambda tensor: tensor.double()),
    ],
)
def test_a_batch_of_another_model_is_not_replayed(met, capsys, name, change):
    batch = met.with_suffix(".safetensors")
    tensors = load_file(batch)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, batch)
    assert main(["replay", str(met)]) == 65
    assert re.fullmatch(f"xar-scale: report {met}: .*{name}.*\n", capsys.readouterr().err)


def test_a_report_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no report at"):
        reports.read(tmp_path / "none.json")
    run = Guarded(tmp_path)
    run.spoil(monkeypatch, 1)
    run.resolve()
    path = tmp_path / "reports" / "step-00000005.json"
    whole, batch = path.read_text(), path.with_suffix(".safetensors")
    for torn in (whole[:100], "[" * 100000):
        path.write_text(torn)
        with pytest.raises(DataError, match="torn or changed"):
            reports.read(path)
    path.write_text(whole.replace('"format": 1', '"format": 7'))
    with pytest.raises(DataError, match=r"^report \S+ has format 7, this version reads 1$"):
        reports.read(path)
    values = json.loads(whole)
    path.write_text(json.dumps(values | {"batch": values["batch"] | {"rank": -1}}))
    with pytest.raises(DataError, match="torn or changed"):  # not the last rank's
        reports.read_summary(path)
    path.write_text(whole)
    batch.write_bytes(batch.read_bytes()[:50])
    with pytest.raises(DataError, match="its batch cannot be read"):
        reports.read(path)
    batch.unlink()
    with pytest.raises(DataError, match="its batch step-00000005.safetensors is missing"):
        reports.read(path)
