"""Faults planted on 2 ranks under ZeRO-3, FSDP2 and DDP: what the ladder does, what it costs, and that the run comes out as if not."""

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.dist.states import assert_bitwise, state
from tests.processes import ROOT, Ended, launch
from xar_scale.checkpoint.manifest import read_manifest
from xar_scale.cli import main
from xar_scale.evaluate.digits import cache_digits

pytestmark = pytest.mark.long
STEPS = 16
ENGINES = ("deepspeed", "fsdp2", "ddp")
SETTINGS = [
    "model.width=64",
    "data.workers=0",
    f"train.steps={STEPS}",
    "train.global_batch=96",
    "train.micro_batch=24",  # two passes a step
    "train.log_every=1",
    "train.checkpoint_every=8",
    "train.keep_last=9",
    "train.ds_config=tests/dist/zero3.json",
    "optim.warmup_steps=5",
    "optim.ema_snapshots_every=8",  # so that the power-function averages are taken back too
    "guard.snapshot_every=3",
    "guard.hold_steps=3",
]


class Run:
    """A training with faults planted."""

    def __init__(self, folder: Path, name: str, engine: str, faults: list[dict], *more: str, world: int = 2) -> None:
        self.path = folder / f"{engine}-{name}"
        words = ["train", "--recipe", "digits", "--run-dir", str(self.path), f"data.path={folder / 'data'}"]
        words += [*SETTINGS, f"train.engine={engine}", "train.precision=bf16", *more]
        self.ended: Ended = launch(
            world, ["-m", "tests.injected", json.dumps(faults), *words], folder / "logs" / self.path.name
        )
        self.log = self.ended.outputs[0]

    @property
    def reports(self) -> list[dict]:
        """In the order in which they were written."""
        paths = sorted((self.path / "reports").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [json.loads(path.read_text()) for path in paths]

    def state(self, step: int = STEPS) -> dict[str, torch.Tensor]:
        return state(self.path, step)

    def metrics(self, name: str) -> list:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # each step once, whatever was taken back
        return [line[name] for line in lines]

    def steps_back(self) -> list[tuple[int, int]]:
        """Of each roll back the step at which it was decided, and the one that the run went back to."""
        met = re.findall(r"guard: (?:after )?step (\d+)[^\n]*: roll back|guard: rolled back to step (\d+)", self.log)
        return [(int(at), int(to)) for (at, _), (_, to) in zip(met[::2], met[1::2], strict=True)]


@pytest.fixture(scope="module")
def runs(folder):
    """Runs by name, each made once."""

    @cache
    def run(name: str, engine: str) -> Run:
        faults, more = RUNS[name]
        return Run(folder, name, engine, faults, *more)

    return run


def fault(kind: str, step: int, **more) -> dict:
    return {"kind": kind, "step": step, **more}


ONCE = [
    fault("loss", 2, once=True),
    fault("gradient", 4, once=True, value=float("inf")),
    fault("activation", 5, once=True, rank=0),
    fault("weight", 7, once=True),
    fault("moment", 9, once=True, rank=0),
    fault("moment", 13, once=True, value=float("inf")),
]
RUNS: dict[str, tuple[list[dict], list[str]]] = {
    "undisturbed": ([], []),
    "exact": ([], ["train.precision=fp32"]),
    "once": (ONCE, []),
    "bf16 only": ([fault("activation", 6, until=8)], []),
    "latent": ([fault("latent", 6)], ["train.global_batch=600", "train.micro_batch=null"]),  # three epochs and more
    "gradient": ([fault("gradient", 9)], ["guard.max_quarantined=0"]),
    "weight": ([fault("weight", 10)], ["guard.max_rollbacks=2"]),
    # ZeRO-3 of DeepSpeed 0.19.8 leaves out a step whose gradient is not finite, and says nothing; a moment it does not look at
    "unguarded": ([fault("loss", 3, once=True), fault("moment", 5, once=True)], ["guard.enabled=false", "train.steps=8"]),
    "fp16": ([fault("overflow", 6, until=8)], ["train.precision=fp16"]),
    # finite, and far from what it should be, while compute is bf16
    "spike": ([fault("activation", 10, value=30.0)], ["guard.spike=5", "guard.spike_window=5"]),
    "exact with fp16's overflow": ([fault("overflow", 6, until=8)], ["train.precision=fp32"]),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_faults_that_come_once_leave_no_trace_in_the_run(runs, engine):
    run = runs("once", engine)
    assert run.ended.codes == [0, 0], run.ended.text
    undisturbed = runs("undisturbed", engine)
    assert_bitwise(run.state(), undisturbed.state())
    for name in ("loss", "grad_norm", "lr", "epoch"):
        assert run.metrics(name) == undisturbed.metrics(name)
    guard = read_manifest(run.path / "checkpoints" / f"step-{STEPS:08d}").manifest.guard
    assert (guard.transients, guard.rollbacks, guard.quarantined, guard.skipped, guard.lowered) == (3, 3, 0, 0, False)
    culprits = {report["step"]: report["culprits"] for report in run.reports}
    assert culprits == {2: [1], 4: [], 5: [0], 7: [1], 10: [0], 14: [1]}  # a spoilt moment is met in the weight that it makes
    assert run.metrics("guard_rollbacks")[-1] == 3 and run.metrics("guard_transients")[-1] == 3
    assert run.steps_back() == [(7, 6), (10, 9), (14, 12)]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    unknown = [line["step"] for line in lines if "largest_activation" not in line]
    assert unknown == [3, 5, 6]  # of a first attempt that was not taken


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fault_of_bf16_alone_is_outlived_in_tf32(runs, engine):
    run = runs("bf16 only", engine)
    assert run.ended.codes == [0, 0], run.ended.text
    assert run.metrics("precision") == ["bf16"] * 6 + ["tf32"] * 4 + ["bf16"] * 6  # step 6, and three that are held
    (report,) = run.reports
    assert [(attempt["mode"], attempt["action"]) for attempt in report["attempts"]] == [
        ("bf16", "retry"),
        ("bf16", "retry"),
        ("tf32", "step"),
    ]
    assert report["culprits"] == [1]
    assert report["ranks"][1]["forward"] == "decoder.0" and report["ranks"][0]["forward"] is None
    exact, undisturbed = runs("exact", engine), runs("undisturbed", engine)
    ours = torch.tensor(run.metrics("loss"))
    torch.testing.assert_close(ours, torch.tensor(exact.metrics("loss")), rtol=2e-2, atol=0)
    assert run.metrics("loss")[:6] == undisturbed.metrics("loss")[:6] != exact.metrics("loss")[:6]


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_fp16_that_overflows_for_real_goes_on_in_tf32(runs, engine):
    run, exact = runs("fp16", engine), runs("exact with fp16's overflow", engine)
    assert run.ended.codes == [0, 0] == exact.ended.codes, run.ended.text
    assert run.metrics("precision") == ["fp16"] * 6 + ["tf32"] * 4 + ["fp16"] * 6
    assert exact.reports == []
    (report,) = run.reports
    assert report["culprits"] == [0, 1] and {rank["forward"] for rank in report["ranks"]} == {"in_proj"}
    torch.testing.assert_close(torch.tensor(run.metrics("loss")), torch.tensor(exact.metrics("loss")), rtol=2e-2, atol=0)
    assert min(run.metrics("guard_scale")) >= 2**10


def test_a_loss_that_only_bf16_makes_diverge_is_taken_in_tf32(runs):
    run = runs("spike", "fsdp2")
    assert run.ended.codes == [0, 0], run.ended.text
    assert run.metrics("precision") == ["bf16"] * 10 + ["tf32"] * 4 + ["bf16"] * 2
    (report,) = run.reports
    assert [(attempt["mode"], attempt["bad"], attempt["action"]) for attempt in report["attempts"]] == [
        ("bf16", [], "retry"),
        ("tf32", [], "step"),
    ]
    assert report["attempts"][0]["loss"] > 1.5 * report["attempts"][1]["loss"]
    exact = torch.tensor(runs("exact", "fsdp2").metrics("loss"))
    torch.testing.assert_close(torch.tensor(run.metrics("loss")), exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sample_that_is_not_finite_is_taken_out_and_never_comes_again(runs, engine):
    run = runs("latent", engine)
    assert run.ended.codes == [0, 0], run.ended.text
    manifest = read_manifest(run.path / "checkpoints" / f"step-{STEPS:08d}").manifest
    (report,) = run.reports
    (bad,) = [sample for sample in report["samples"] if sample["latent_norm"] is None]
    assert [tuple(place) for place in manifest.quarantined] == [(bad["shard"], bad["position"])]
    assert manifest.guard.quarantined == 1 and report["culprits"] == [1]
    assert manifest.position.epoch > 3


@pytest.mark.parametrize("engine", ENGINES)
def test_what_nothing_helps_against_stops_the_run_with_70_and_a_finite_checkpoint(runs, engine):
    run = runs("gradient", engine)
    assert run.ended.codes == [70, 70], run.ended.text
    assert run.ended.text.count("xar-scale: step 9 cannot be taken: samples to quarantine: 9") == 1
    assert "traced to rank 1" in run.log and "in the gradient of encoder.1" in run.log
    assert f"the newest checkpoint, {run.path}/checkpoints/step-00000008, is finite" in run.log
    assert all(tensor.isfinite().all() for tensor in run.state(8).values())
    assert_bitwise(run.state(8), runs("undisturbed", engine).state(8))
    run = runs("weight", engine)
    assert run.ended.codes == [70, 70], run.ended.text
    assert "already rolled back 2 times (guard.max_rollbacks)" in run.log
    assert_bitwise(run.state(8), runs("undisturbed", engine).state(8))
    assert [path.name for path in sorted((run.path / "checkpoints").glob("step-*"))] == ["step-00000008"]


@pytest.mark.parametrize("engine", ENGINES)
def test_without_the_guard_one_nan_destroys_the_run(runs, engine):
    run = runs("unguarded", engine)
    assert run.ended.codes == [0, 0], run.ended.text
    assert not all(tensor.isfinite().all() for name, tensor in run.state(8).items() if name.startswith("model/"))
    assert all(math.isnan(loss) for loss in run.metrics("loss")[6:])  # and from then on no step is any good


def test_a_run_resumed_in_tf32_with_a_sample_taken_out_goes_on_bitwise(tmp_path_factory):
    """On one process; and one that is resumed in another precision is in that."""
    folder = tmp_path_factory.mktemp("resumed")
    cache_digits(folder / "data", samples_per_shard=500)
    more = ["train.engine=single", "train.global_batch=600", "train.micro_batch=null", "guard.hold_steps=8", "train.steps=12"]
    faults = [fault("latent", 1, rank=0), fault("activation", 6, rank=0)]
    whole = Run(folder, "whole", "single", faults, *more, world=1)
    assert whole.ended.codes == [0], whole.ended.text
    middle = str(whole.path / "checkpoints" / "step-00000008")
    resumed = Run(folder, "resumed", "single", [], *more, "--resume", middle, world=1)
    assert resumed.ended.codes == [0], resumed.ended.text
    assert_bitwise(resumed.state(12), whole.state(12))
    lines = [json.loads(line) for line in (resumed.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["precision"] for line in lines] == ["tf32"] * 4
    assert whole.metrics("precision") == ["bf16"] * 6 + ["tf32"] * 6
    assert lines[-1]["guard_quarantined"] == 1 and whole.metrics("epoch")[-1] > 3
    other = Run(folder, "other", "single", [], *more, "train.precision=fp16", "--resume", middle, world=1)
    assert other.ended.codes == [0] and "fp16; attention" in other.log and "computing in tf32" not in other.log
    off = Run(folder, "off", "single", [], *more, "guard.enabled=false", "--resume", middle, world=1)
    assert off.ended.codes == [0] and "computing in tf32" not in off.log


def test_a_real_overflow_is_reproduced_on_one_process(runs, capsys):
    run = runs("fp16", "fsdp2")
    report = next((run.path / "reports").glob("*.json"))
    # its weights are scaled still; of step 6 or before the run has none
    assert main(["replay", str(report), "--checkpoint", str(run.path / "checkpoints" / "step-00000008")]) == 0
    shown = capsys.readouterr().out
    assert "first output that is not finite:   in_proj" in shown and shown.endswith("\nreproduced\n")
    assert main(["replay", str(report), "--checkpoint", str(run.path / "checkpoints" / "step-00000016")]) == 0
    assert "\nnot reproduced" in capsys.readouterr().out
    assert main(["replay", str(report)]) == 64
    assert "holds no checkpoint of step 6 or before; name one with --checkpoint" in capsys.readouterr().err


def rungs(report: dict) -> list[str]:
    """What the ladder did at one step, in a few words."""
    words, modes = [], [attempt["mode"] for attempt in report["attempts"]]
    for mode, following, attempt in zip(modes, [*modes[1:], None], report["attempts"], strict=True):
        retried = "retry" if following == mode else "retry in TF32"
        words.append(
            {"retry": retried, "roll back": "roll back", "step": "", "quarantine": "quarantine"}.get(attempt["action"], "stop")
        )
    return list(filter(None, words))


def seen(runs, engine: str) -> list[str]:
    """The rows of the table in docs/precision.md, from what the runs of ``engine`` left."""
    undisturbed, exact = runs("undisturbed", engine), runs("exact", engine)

    def bitwise(run: Run, step: int) -> str:
        ours, theirs = run.state(step), undisturbed.state(step)
        same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
        return "bitwise equal to the undisturbed run" if same else "different"

    def near(run: Run, other: Run) -> str:
        apart = max(abs(a / b - 1) for a, b in zip(run.metrics("loss"), other.metrics("loss"), strict=True))
        return "within 2 % of the fp32 run's losses" if apart < 0.02 else "off"

    def row(what: str, run: Run, after: str, *at: int) -> str:
        reports = [run.reports[number] for number in at] or run.reports
        steps = {report["step"] for report in reports}
        back = sum(found - to for found, to in run.steps_back() if found in steps) if run.ended.codes == [0, 0] else "-"
        return f"| {what} | {', '.join(word for report in reports for word in rungs(report))} | {back} | {after} |"

    once = runs("once", engine)
    rows = [
        row(what, once, bitwise(once, STEPS), at)
        for at, what in enumerate(
            [
                "NaN in one rank's loss, once",
                "Inf in one rank's gradient, once",
                "NaN in one rank's activation, once",
                "NaN in a weight, once",
                "NaN in a moment, once, found in the weight it updates",
                "Inf in a moment, once, found in the weight it updates",
            ]
        )
    ]
    lowered, latent = runs("bf16 only", engine), runs("latent", engine)
    rows.append(row("NaN in an activation while compute is bf16", lowered, near(lowered, exact)))
    taken_out = read_manifest(latent.path / "checkpoints" / f"step-{STEPS:08d}").manifest.quarantined
    rows.append(row("NaN in one latent of one sample, always", latent, f"without {len(taken_out)} sample"))
    for name, what in (("gradient", "NaN in one rank's gradient, always"), ("weight", "NaN in a weight, always")):
        run = runs(name, engine)
        rows.append(row(what, run, f"exit code {run.ended.codes[0]}, checkpoint {bitwise(run, 8)}"))
    return rows


@pytest.mark.parametrize("engine", ENGINES)
def test_the_table_in_the_docs_is_what_was_seen(runs, engine):
    page = (ROOT / "docs" / "precision.md").read_text()
    missing = [row for row in seen(runs, engine) if row not in page]
    assert not missing, "\n".join(missing)
