"""What the doctor reports about this machine, and about simulated ones."""

from dataclasses import replace

import pytest
import torch

from xar_scale import doctor
from xar_scale.cli import main
from xar_scale.doctor import Machine, judge, refusal, this_machine
from xar_scale.precision import MODES
from xar_scale.tables import aligned

CPU = torch.device("cpu")
HERE = this_machine(CPU)
OLD = Machine(torch.device("cuda", 0), ("Tesla T4",), (7, 5))
NEW = replace(OLD, names=("NVIDIA H100",), capability=(9, 0))


@pytest.fixture
def rows():
    return {row.mode: row for row in doctor.modes(HERE)}


def test_every_mode_is_timed_and_verified(rows):
    assert list(rows) == list(MODES)
    assert all(float(row.tflops) > 0 for row in rows.values())
    for mode in ("bf16", "fp16", "fp32"):
        assert rows[mode].finding.startswith(f"is {mode} (error ")


def test_rows_are_what_the_engines_use(rows):
    assert rows["bf16"][2:6] == ("bfloat16", "bfloat16", "float32", "high")
    assert rows["fp32"][2:6] == ("float32", "float32", "float32", "highest")
    assert rows["bf16"].attention.startswith("prefix (PyTorch") and rows["fp32"].attention.startswith("prefix (PyTorch")


def test_a_cpu_has_no_tf32_and_says_so(rows):
    assert "is plain float32" in rows["tf32"].finding and "a CPU has no TF32" in rows["tf32"].finding


def test_deepspeed_takes_all_but_fp16(rows):
    assert {mode for mode, row in rows.items() if "deepspeed" in row.engines} == {"bf16", "tf32", "fp32"}
    assert all("single, ddp, fsdp2" in row.engines for row in rows.values())
    assert "deepspeed refused: its ranks disagree on skipping a step" in rows["fp16"].finding


def test_modes_that_an_old_gpu_lacks_are_refused():
    assert refusal("bf16", OLD) == "compute capability 7.5 lacks bfloat16, which needs 8.0: use fp16"
    assert refusal("tf32", OLD) == "compute capability 7.5 lacks TF32, which needs 8.0: it would run as plain float32"
    assert refusal("fp16", OLD) == refusal("fp32", OLD) == ""
    assert not any(refusal(mode, machine) for mode in MODES for machine in (NEW, HERE))


def test_refused_modes_are_not_run(monkeypatch):
    ran = []
    monkeypatch.setattr(doctor, "_teraflops", lambda mode, device: ran.append(mode) or 1.0)
    monkeypatch.setattr(doctor, "_error", lambda mode, device: 3e-7 if mode == "fp32" else 3e-4)
    rows = {row.mode: row for row in doctor.modes(OLD)}
    assert ran == ["fp16", "fp32"]
    for mode in ("bf16", "tf32"):
        assert rows[mode].finding.startswith("refused: compute capability 7.5")
        assert (rows[mode].tflops, rows[mode].engines) == ("-", "none")


@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        ("tf32", 3e-4, "is tf32 (error 3e-04)"),
        ("tf32", 3e-7, "is plain float32 (error 3e-07): TF32 is off here"),
        ("fp32", 3e-4, "is NOT fp32: error 3e-04, not between 0e+00 and 2e-06"),
        ("bf16", 3e-4, "is NOT bf16"),
        ("fp16", 3e-3, "is NOT fp16"),
        ("bf16", float("nan"), "is NOT bf16"),
    ],
)
def test_wrong_arithmetic_is_detected(mode, error, said):
    assert judge(mode, error, NEW).startswith(said)


def test_wrong_arithmetic_is_detected_by_running_it(monkeypatch):
    """Engines would compute in bfloat16 although the table says float32."""
    monkeypatch.setitem(doctor.MODES, "fp32", MODES["bf16"])
    finding = next(row.finding for row in doctor.modes(HERE) if row.mode == "fp32")
    assert finding.startswith("is NOT fp32: error 3e-03")


def test_products_are_made_in_the_modes_own_matmul_mode(monkeypatch):
    used = {}

    def error(mode, device):
        used[mode] = torch.get_float32_matmul_precision()
        return 0.0

    monkeypatch.setattr(doctor, "_error", error)
    doctor.modes(HERE)
    assert used == {mode: precision.matmul for mode, precision in MODES.items()}


def test_the_matmul_mode_is_put_back():
    torch.set_float32_matmul_precision("high")
    try:
        doctor.modes(HERE)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_facts_name_what_is_there_and_what_is_not(monkeypatch):
    facts = dict(doctor.facts(replace(HERE, names=("H100", "H100"))))
    assert facts["torch"] == torch.__version__
    assert facts["apex"] == "not installed"
    assert facts["device"] == "2 x H100"

    def missing(package):
        raise doctor.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert dict(doctor.facts(HERE))["deepspeed"] == "not installed"


@pytest.mark.parametrize("folder", ["site", "a; b: c"])
def test_another_package_named_apex_is_reported(monkeypatch, tmp_path, folder):
    (package := tmp_path / folder / "apex").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    said = dict(doctor.facts(HERE))["apex"]
    assert said.startswith(f"{package} is not NVIDIA's apex, which has apex.optimizers, but another package of that name (pip")


def test_columns_stand_under_their_titles():
    assert aligned(("a", "b"), [("long", "x"), ("s", "")]) == "a     b\nlong  x\ns"


def test_the_command_prints_both_tables_and_exits_with_0(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    first = lines.index(next(line for line in lines if line.startswith("mode "))) + 1
    assert [line.split()[0] for line in lines[first : first + 4]] == list(MODES)
    assert lines[first + 4] == "" and lines[first + 5].startswith("environment")
    assert lines[0].split() == ["what", "found"] and any(line.startswith("deepspeed") for line in lines)
    assert printed.err == ""
    assert main(["doctor", "train.steps=1"]) == 64
