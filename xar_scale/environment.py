"""Checks what a run depends on besides its own device: other ranks' devices, the network, disks, clocks, settings; with advice.

Every rank makes the same calls. All checks together take seconds.
"""

import os
import resource
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from packaging.version import Version

from xar_scale import dist
from xar_scale.data.reader import LatentShards
from xar_scale.doctor import REFUSED, Mode
from xar_scale.errors import DataError
from xar_scale.files import path_in_errors
from xar_scale.model.apex import is_another_package
from xar_scale.stragglers import SLOW

DEEPSPEED = "0.19.8"  # before it, under ZeRO-3 a NaN on one rank reaches every rank's weights
MESSAGES = (1 << 20, 1 << 26)  # bytes
REPEATS = 5
DISK_BYTES = 1 << 28
FREE_GB = 100  # for a run folder: a few checkpoints of xar_h
SKEW_S = 1.0
FILES = 4096  # minimum limit of open files per process


class Finding(NamedTuple):
    """A row of the printed table. ``advice``: what to do, empty if nothing."""

    what: str
    found: str
    advice: str = ""


def network(device: torch.device) -> list[Finding]:
    """Measure the bandwidth per rank of all-reduce and all-gather at two message sizes."""
    if dist.world() == 1:
        return []
    world, findings = dist.world(), []
    for size in MESSAGES:
        whole = torch.ones(max(size // 4 // world, 1) * world, device=device)
        share = whole[: whole.numel() // world].clone()
        calls: dict[str, tuple[float, Callable[[], object]]] = {  # by name: bytes a rank sends, as a fraction of the whole
            "all-reduce": (2 * (world - 1) / world, lambda whole=whole: torch_dist.all_reduce(whole)),  # type: ignore[misc]
            "all-gather": (
                (world - 1) / world,
                lambda whole=whole, share=share: dist.all_gather(whole, share),  # type: ignore[misc]
            ),
        }
        for name, (moved, call) in calls.items():
            seconds = _median(call, device)
            sent = moved * whole.numel() * 4
            findings.append(
                Finding(f"{name} of {size >> 20} MB", f"{sent / seconds / 1e9:.2f} GB/s per rank, {seconds * 1e3:.2f} ms")
            )
    return findings


def _median(call: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        dist.gather_objects(None)
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(dist.max_over_ranks(time.perf_counter() - begun))
    return statistics.median(seconds[1:])


def disk(what: str, folder: Path, *, written: bool) -> list[Finding]:
    """Check the free space of ``folder`` and measure its speed, on rank 0.

    ``written``: write, flush and read back a test file. Otherwise read one of the folder's files, and check that the folder is
    a data set.
    """

    def check() -> list[Finding]:
        usage = shutil.disk_usage(folder)
        advice = f"free some space: below {FREE_GB} GB; checkpoints of large models take tens of GB" if written else ""
        findings = [
            Finding(f"{what} {folder}", f"{usage.free / 1e9:.0f} GB free", advice if usage.free < FREE_GB * 1e9 else "")
        ]
        if written:
            path = folder / f".doctor-{os.getpid()}"
            try:
                rate = _write(path)
                findings += [
                    Finding("  written and flushed", f"{rate / 1e6:.0f} MB/s"),
                    Finding("  read", f"{_read(path) / 1e6:.0f} MB/s"),
                ]
            finally:
                path.unlink(missing_ok=True)
            return findings
        try:
            LatentShards(folder)
        except DataError as error:
            advice = f"training on it would exit with {error.exit_code}: give the folder of a complete data set (docs/data.md)"
            findings.append(Finding("  data set", str(error), advice))
        if files := sorted(folder.glob("*.tar"), key=lambda path: -path.stat().st_size):
            findings.append(Finding(f"  read, {files[0].name}", f"{_read(files[0]) / 1e6:.0f} MB/s"))
        return findings

    return dist.on_rank_0(check)


def _write(path: Path) -> float:
    """Return the write speed in bytes per second."""
    block = os.urandom(1 << 22)
    begun = time.perf_counter()
    with path_in_errors(path), path.open("wb", buffering=0) as file:
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return DISK_BYTES / (time.perf_counter() - begun)


def _read(path: Path) -> float:
    """Return the read speed in bytes per second, bypassing the page cache where the system allows."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun, size = time.perf_counter(), 0
        while size < DISK_BYTES and (block := file.read(1 << 22)):
            size += len(block)
    return size / (time.perf_counter() - begun)


def clocks() -> list[Finding]:
    """Measure how far the nodes' clocks are apart."""
    if dist.world() == 1:
        return []
    dist.gather_objects(None)  # so that all ranks read their clocks at about the same time
    gathered = dist.gather_objects((time.time(), socket.gethostname()))
    skew = max(gathered)[0] - min(gathered)[0]
    hosts = f"{min(gathered)[1]} and {max(gathered)[1]}"
    advice = f"synchronize the clocks (chrony): logs of {hosts} cannot be merged" if skew > SKEW_S else ""
    return [Finding("clocks", f"within {skew:.2f} s", advice)]


def arithmetic(modes: Sequence[Mode]) -> list[Finding]:
    """Find ranks whose device is slow in a precision or computes it wrongly. Wrong results on rank 0 are in its own table."""
    gathered = dist.gather_objects((socket.gethostname(), {row.mode: (row.tflops, row.finding) for row in modes}))
    findings = []
    for mode in gathered[0][1]:
        rates = {rank: float(rows[mode][0]) for rank, (_, rows) in enumerate(gathered) if rows[mode][0] != REFUSED}
        median = statistics.median(rates.values()) if rates else 0.0
        for rank, (host, rows) in enumerate(gathered):
            what, (tflops, finding) = f"{mode} of rank {rank} ({host})", rows[mode]
            if rank in rates and rates[rank] * SLOW < median:
                advice = "the device is throttled or shared with another job: have it inspected, or exclude the node"
                findings.append(Finding(what, f"{tflops} TFLOP/s, the median rank {median:.3g}", advice))
            if rank and finding.startswith(("is NOT", "refused")):
                findings.append(Finding(what, finding, "a device unlike the other ranks', or broken: exclude the node"))
    return findings


# variable: whether a value is harmful, and the advice
SETTINGS: dict[str, tuple[Callable[[str], bool], str]] = {
    "NCCL_P2P_DISABLE": (lambda value: value == "1", "GPUs of a node communicate through host memory: unset it"),
    "NCCL_SHM_DISABLE": (lambda value: value == "1", "ranks of a node communicate over the network: unset it"),
    "NCCL_IB_DISABLE": (lambda value: value == "1", "InfiniBand is disabled: unset it if the node has InfiniBand"),
    "NCCL_BLOCKING_WAIT": (lambda value: value == "1", "the host waits for each collective: unset it"),
    "TORCH_NCCL_BLOCKING_WAIT": (lambda value: value == "1", "the host waits for each collective: unset it"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (lambda value: value == "0", "a rank that dies leaves the others hanging: unset it"),
    "NCCL_DEBUG": (lambda value: value.upper() in ("INFO", "TRACE"), "logs fill up: set WARN once it works"),
    "CUDA_LAUNCH_BLOCKING": (lambda value: value == "1", "the host waits for each kernel: unset it"),
    "TORCH_DISTRIBUTED_DEBUG": (lambda value: value.upper() == "DETAIL", "a second collective checks each one: unset it"),
}


def settings(environ: Mapping[str, str], local_world: int, cores: int) -> list[Finding]:
    """Find environment variables and limits of this process that slow a run down or end it."""
    findings = [
        Finding(name, environ[name], why) for name, (hurts, why) in SETTINGS.items() if name in environ and hurts(environ[name])
    ]
    interfaces = [name for _, name in socket.if_nameindex()]
    for name, accepts in (("NCCL_SOCKET_IFNAME", _nccl_accepts), ("GLOO_SOCKET_IFNAME", _gloo_accepts)):
        if (value := environ.get(name)) and not accepts(value, interfaces):
            findings.append(Finding(name, value, f"no such interface; this node has {', '.join(interfaces)}: name one of them"))
    given = environ.get("OMP_NUM_THREADS", "")
    first = given.partition(",")[0].strip()
    asked = int(first) if first.isdecimal() else 0
    threads = asked or cores  # OpenMP ignores anything but a positive number
    if threads * local_world > cores and local_world > 1:
        findings.append(
            Finding(
                "OMP_NUM_THREADS",
                given if asked else f"{given or 'not set'}: {cores}",
                f"{local_world} ranks x {threads} threads share {cores} cores: set at most {max(1, cores // local_world)}",
            )
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        advice = f"ulimit -n {min(FILES, hard)}: data workers and checkpoints of many ranks open many files"
        findings.append(Finding("open files", f"{soft} per process", advice))
    if Path("/dev/shm").is_dir() and (shm := shutil.disk_usage("/dev/shm").total) < 1 << 30:
        findings.append(
            Finding("/dev/shm", f"{shm >> 20} MB", "data workers pass batches through it: docker run --shm-size=8g")
        )
    return findings


def _nccl_accepts(value: str, interfaces: Sequence[str]) -> bool:
    """Whether NCCL finds an interface. ``value`` lists name prefixes; after ``=`` names; after ``^`` exclusions of either."""
    excluded, value = value.startswith("^"), value.removeprefix("^")
    exact, names = value.startswith("="), value.removeprefix("=").split(",")
    named = [name for name in interfaces if (name in names if exact else name.startswith(tuple(names)))]
    return len(named) < len(interfaces) if excluded else bool(named)


def _gloo_accepts(value: str, interfaces: Sequence[str]) -> bool:
    return set(value.split(",")) <= set(interfaces)  # gloo needs every named interface


def software(versions: Mapping[str, str]) -> list[Finding]:
    """Find outdated packages, and packages whose version differs between ranks."""
    findings = []
    installed = versions.get("deepspeed", "not installed")
    if installed[0].isdigit() and Version(installed) < Version(DEEPSPEED):
        advice = f"pip install 'deepspeed>={DEEPSPEED}': with older versions a NaN on one rank corrupts all ranks' weights"
        findings.append(Finding("deepspeed", installed, advice))
    if is_another_package():
        findings.append(Finding("apex", versions["apex"], "pip uninstall apex; NVIDIA's is built from its repository"))
    everywhere: list[dict[str, Any]] = dist.gather_objects(dict(versions))
    for name in versions:
        found = [of_rank.get(name) for of_rank in everywhere]
        if len(set(found)) > 1:
            other = next(rank for rank, version in enumerate(found) if version != found[0])
            findings.append(
                Finding(name, f"{found[0]} on rank 0, {found[other]} on rank {other}", "install the same version on all nodes")
            )
    return findings
