"""What a run stands on beside one device: other ranks', the network, disks, clocks, settings; and what to do where one is bad.

Every rank makes the same calls. All of it takes seconds.
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
from xar_scale.stragglers import SLOW

DEEPSPEED = "0.19.8"  # before it ZeRO-3 lets a NaN of one rank into every rank's weights
MESSAGES = (1 << 20, 1 << 26)  # bytes
REPEATS = 5
DISK_BYTES = 1 << 28
FREE_GB = 100  # of a run's folder: a few checkpoints of xar_h
SKEW_S = 1.0
FILES = 4096  # that a process may have open


class Finding(NamedTuple):
    """A row for people. ``advice``: what to do, where something is to be done."""

    what: str
    found: str
    advice: str = ""


def network(device: torch.device) -> list[Finding]:
    """What each rank sends and receives a second, in sums and gathers of two sizes."""
    if dist.world() == 1:
        return []
    world, findings = dist.world(), []
    for size in MESSAGES:
        whole = torch.ones(max(size // 4 // world, 1) * world, device=device)
        share = whole[: whole.numel() // world].clone()
        calls: dict[str, tuple[float, Callable[[], object]]] = {  # by name: of the whole, how much a rank sends
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
                Finding(f"{name} of {size >> 20} MB", f"{sent / seconds / 1e9:.2f} GB/s a rank, {seconds * 1e3:.2f} ms")
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
        seconds.append(dist.largest(time.perf_counter() - begun))
    return statistics.median(seconds[1:])


def disk(what: str, folder: Path, *, written: bool) -> list[Finding]:
    """Free space of ``folder`` and, from rank 0, how fast it is: written, flushed and read back, or one of its files read.

    Where it is not ``written``, also whether it is a data set.
    """

    def look() -> list[Finding]:
        usage = shutil.disk_usage(folder)
        advice = f"make room: checkpoints of large models take tens of GB, {FREE_GB} GB are little" if written else ""
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
            advice = f"training there ends with {error.exit_code}: name the folder of a whole set (docs/data.md)"
            findings.append(Finding("  data set", str(error), advice))
        if files := sorted(folder.glob("*.tar"), key=lambda path: -path.stat().st_size):
            findings.append(Finding(f"  read, {files[0].name}", f"{_read(files[0]) / 1e6:.0f} MB/s"))
        return findings

    return dist.on_rank_0(look)


def _write(path: Path) -> float:
    """Bytes a second."""
    block = os.urandom(1 << 22)
    begun = time.perf_counter()
    with path_in_errors(path), path.open("wb", buffering=0) as file:
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return DISK_BYTES / (time.perf_counter() - begun)


def _read(path: Path) -> float:
    """Bytes a second, not from this node's memory as far as the system lets it go."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun, size = time.perf_counter(), 0
        while size < DISK_BYTES and (block := file.read(1 << 22)):
            size += len(block)
    return size / (time.perf_counter() - begun)


def clocks() -> list[Finding]:
    """How far the nodes' clocks are apart."""
    if dist.world() == 1:
        return []
    dist.gather_objects(None)  # all ask at about the same time
    told = dist.gather_objects((time.time(), socket.gethostname()))
    skew = max(told)[0] - min(told)[0]
    advice = (
        f"set the clocks (chrony): logs of {min(told)[1]} and {max(told)[1]} cannot be put together" if skew > SKEW_S else ""
    )
    return [Finding("clocks", f"within {skew:.2f} s", advice)]


def arithmetic(modes: Sequence[Mode]) -> list[Finding]:
    """Ranks whose device is slow in a precision, or does not compute it as it should; of rank 0 its own table says that."""
    told = dist.gather_objects((socket.gethostname(), {row.mode: (row.tflops, row.finding) for row in modes}))
    findings = []
    for mode in told[0][1]:
        rates = {rank: float(rows[mode][0]) for rank, (_, rows) in enumerate(told) if rows[mode][0] != REFUSED}
        median = statistics.median(rates.values()) if rates else 0.0
        for rank, (host, rows) in enumerate(told):
            what, (tflops, finding) = f"{mode} of rank {rank} ({host})", rows[mode]
            if rank in rates and rates[rank] * SLOW < median:
                advice = "it is throttled, or something else runs on it: have it looked at, or take the node out"
                findings.append(Finding(what, f"{tflops} TFLOP/s, the median rank {median:.3g}", advice))
            if rank and finding.startswith(("is NOT", "refused")):
                findings.append(Finding(what, finding, "another device than the others', or a broken one: take the node out"))
    return findings


# name: when it hurts, and why
SETTINGS: dict[str, tuple[Callable[[str], bool], str]] = {
    "NCCL_P2P_DISABLE": (lambda value: value == "1", "GPUs of a node exchange through the host's memory: unset it"),
    "NCCL_SHM_DISABLE": (lambda value: value == "1", "ranks of a node exchange through the network: unset it"),
    "NCCL_IB_DISABLE": (lambda value: value == "1", "InfiniBand is not used: unset it, if there is one"),
    "NCCL_BLOCKING_WAIT": (lambda value: value == "1", "the host waits for each collective: unset it"),
    "TORCH_NCCL_BLOCKING_WAIT": (lambda value: value == "1", "the host waits for each collective: unset it"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (lambda value: value == "0", "a rank that dies leaves the others hanging: unset it"),
    "NCCL_DEBUG": (lambda value: value.upper() in ("INFO", "TRACE"), "logs fill up: WARN, once it works"),
    "CUDA_LAUNCH_BLOCKING": (lambda value: value == "1", "the host waits for each kernel: unset it"),
    "TORCH_DISTRIBUTED_DEBUG": (lambda value: value.upper() == "DETAIL", "each collective is checked by another: unset it"),
}


def settings(environ: Mapping[str, str], local_world: int, cores: int) -> list[Finding]:
    """Variables and limits of this process that slow a run down or end it."""
    findings = [
        Finding(name, environ[name], why) for name, (hurts, why) in SETTINGS.items() if name in environ and hurts(environ[name])
    ]
    there = [name for _, name in socket.if_nameindex()]
    for name, found in (("NCCL_SOCKET_IFNAME", _nccl_takes), ("GLOO_SOCKET_IFNAME", _gloo_takes)):
        if (value := environ.get(name)) and not found(value, there):
            findings.append(Finding(name, value, f"no such interface here, there are {', '.join(there)}: name one of them"))
    threads = int((environ.get("OMP_NUM_THREADS") or str(cores)).split(",")[0])
    if threads * local_world > cores and local_world > 1:
        findings.append(
            Finding(
                "OMP_NUM_THREADS",
                environ.get("OMP_NUM_THREADS", f"not set: {cores}"),
                f"{local_world} ranks with {threads} threads share {cores} cores: {max(1, cores // local_world)} at the most",
            )
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        advice = f"ulimit -n {min(FILES, hard)}: data workers and checkpoints of many ranks have many open"
        findings.append(Finding("open files", f"{soft} a process", advice))
    if Path("/dev/shm").is_dir() and (shm := shutil.disk_usage("/dev/shm").total) < 1 << 30:
        findings.append(
            Finding("/dev/shm", f"{shm >> 20} MB", "data workers hand batches over in it: docker run --shm-size=8g")
        )
    return findings


def _nccl_takes(value: str, there: Sequence[str]) -> bool:
    """Whether it finds one: beginnings of names; after = whole names, after ^ those that are not taken."""
    names = value.lstrip("=^").split(",")
    named = [name for name in there if (name in names if value[0] == "=" else name.startswith(tuple(names)))]
    return len(named) < len(there) if value[0] == "^" else bool(named)


def _gloo_takes(value: str, there: Sequence[str]) -> bool:
    return set(value.split(",")) <= set(there)  # all of them


def software(versions: Mapping[str, str]) -> list[Finding]:
    """What of it is too old, and whether all ranks have the same."""
    findings = []
    installed = versions.get("deepspeed", "not installed")
    if installed[0].isdigit() and Version(installed) < Version(DEEPSPEED):
        advice = f"pip install 'deepspeed>={DEEPSPEED}': before it a NaN on one rank spoils all ranks' weights"
        findings.append(Finding("deepspeed", installed, advice))
    if versions.get("apex", "").startswith("the unrelated"):
        findings.append(Finding("apex", versions["apex"], "pip uninstall apex; NVIDIA's is built from its repository"))
    everywhere: list[dict[str, Any]] = dist.gather_objects(dict(versions))
    for name in versions:
        found = [of_rank.get(name) for of_rank in everywhere]
        if len(set(found)) > 1:
            other = next(rank for rank, version in enumerate(found) if version != found[0])
            findings.append(Finding(name, f"{found[0]} on rank 0, {found[other]} on rank {other}", "the same on all nodes"))
    return findings
