"""Reports what this machine really runs: each precision timed and checked, or refused with the reason; installed software."""

import os
import platform
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from xar_scale.config import ModelConfig
from xar_scale.errors import ConfigError
from xar_scale.memory.fallback import device_memory
from xar_scale.model.apex import why_unusable
from xar_scale.model.attention import choose_backend, describe
from xar_scale.model.entities import create_layout
from xar_scale.precision import MODES, autocast, matmul_mode
from xar_scale.presets import model_values

MODEL = ModelConfig(**model_values("xar_b"))  # the model whose attention backend is reported
SIZES = {"cuda": 8192}  # matrix size for timing, by device type
SMALL = 512  # matrix size for timing on other devices, and for all accuracy checks
WARM_UP, REPEATS = 2, 5
# Range of a product's relative error: inputs have 8 significand bits, 11 (fp16, and TF32: rounded or truncated), or 24
ERRORS = {"bf16": (1.5e-3, 1e-2), "fp16": (1e-4, 1.5e-3), "tf32": (1e-4, 1.5e-3), "fp32": (0.0, 2e-6)}
TENSOR_CORES = (8, 0)  # the first compute capability with bfloat16 and TF32
NAMES = {"bf16": "bfloat16", "tf32": "TF32"}
REFUSED = "-"  # printed in place of a rate


@dataclass(frozen=True)
class Machine:
    """The local device. ``capability``: the compute capability of a GPU."""

    device: torch.device
    names: tuple[str, ...]  # of all devices
    capability: tuple[int, int] | None


class Mode(NamedTuple):
    """One precision as a row of the printed table; all values are text."""

    mode: str
    tflops: str
    compute: str
    gather: str
    reduce: str
    matmul: str
    attention: str
    engines: str
    finding: str


def this_machine(device: torch.device) -> Machine:
    if device.type == "cuda":
        names = tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return Machine(device, names, torch.cuda.get_device_capability(device))
    return Machine(device, (f"{platform.machine()} CPU, {os.cpu_count()} cores",), None)


def facts(machine: Machine) -> list[tuple[str, str]]:
    """Return (name, version or state) of the software that training depends on and of the devices, without importing it."""
    apex, *_ = why_unusable(machine.device) or ["NVIDIA's"]
    return [
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("deepspeed", _version("deepspeed")),
        ("flash_attn", _version("flash-attn")),
        ("apex", apex),
        ("cuda", f"torch is built for {torch.version.cuda or 'none'}, {torch.cuda.device_count()} devices"),
        *(("device", f"{count} x {name}") for name, count in Counter(machine.names).items()),
        ("memory", f"{device_memory(machine.device) / 1e9:.0f} GB per rank"),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def refusal(mode: str, machine: Machine) -> str:
    """Return why the device lacks ``mode``; "" if it has it. A CPU computes all modes, TF32 as plain float32."""
    if mode not in NAMES or machine.capability is None or machine.capability >= TENSOR_CORES:
        return ""
    has, needs = (".".join(map(str, version)) for version in (machine.capability, TENSOR_CORES))
    instead = {"bf16": "use fp16", "tf32": "it would run as plain float32"}[mode]
    return f"compute capability {has} lacks {NAMES[mode]}, which needs {needs}: {instead}"


def modes(machine: Machine) -> list[Mode]:
    """Return a row for each precision mode on this device. Refused modes are not run."""
    return [_mode(mode, machine) for mode in MODES]


def _mode(mode: str, machine: Machine) -> Mode:
    precision = MODES[mode]
    compute, gather, reduce = (
        str(dtype).removeprefix("torch.") for dtype in (precision.compute, precision.gather, precision.reduce)
    )
    if reason := refusal(mode, machine):
        tflops, engines, finding = REFUSED, "none", f"refused: {reason}"
    else:
        with matmul_mode(mode):
            tflops = f"{_teraflops(mode, machine.device):.3g}"
            finding = judge(mode, _error(mode, machine.device), machine)
        engines = "single, ddp, fsdp2" if precision.scaled else "single, ddp, fsdp2, deepspeed"
        if precision.scaled:
            finding += "; deepspeed refused: its ranks disagree on skipping a step, and its loss scale never backs off"
    attention = _attention(machine.device, precision.compute)
    return Mode(mode, tflops, compute, gather, reduce, precision.matmul, attention, engines, finding)


def judge(mode: str, error: float, machine: Machine) -> str:
    """Return which arithmetic the ``error`` of a product, relative to the exact one, implies."""
    if _in_range(mode, error):
        return f"is {mode} (error {error:.0e})"
    if mode == "tf32" and _in_range("fp32", error):
        why = "a CPU has no TF32" if machine.device.type == "cpu" else "TF32 is off here"
        return f"is plain float32 (error {error:.0e}): {why}"
    low, high = ERRORS[mode]
    return f"is NOT {mode}: error {error:.0e}, not between {low:.0e} and {high:.0e}"


def _in_range(mode: str, error: float) -> bool:
    low, high = ERRORS[mode]
    return low <= error <= high


def _attention(device: torch.device, dtype: torch.dtype) -> str:
    layout, width = create_layout(MODEL), MODEL.head_width
    try:
        return describe(choose_backend(layout, device, dtype, width, dropout=0.0, backward=True), device, dtype, width)
    except ConfigError as reason:  # flash_attn is installed but broken
        return str(reason)


def _product(mode: str, a: Tensor, b: Tensor) -> Tensor:
    """The product as engines compute it."""
    with autocast(a.device, MODES[mode].compute):
        return a @ b


def _error(mode: str, device: torch.device) -> float:
    """Return the root-mean-square error of a product of float32 matrices, relative to the exact one."""
    a, b = torch.randn(2, SMALL, SMALL, generator=torch.Generator().manual_seed(0)).to(device)
    exact = a.double() @ b.double()
    return ((_product(mode, a, b) - exact).norm() / exact.norm()).item()


def _teraflops(mode: str, device: torch.device) -> float:
    """Return the median speed of a matrix product in 10^12 operations per second."""
    size = SIZES.get(device.type, SMALL)
    a, b = torch.randn(2, size, size, device=device).to(MODES[mode].compute)
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        begun = time.perf_counter()
        _product(mode, a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(seconds[WARM_UP:]) / 1e12
