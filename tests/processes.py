"""Starting ranks as a launcher would: one process each, a free port, a time limit, and nothing left running."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
LIMIT_S = 500


@dataclass
class Ended:
    """How the ranks of a launch ended. Output is stdout and stderr together, a text a rank."""

    codes: list[int]
    outputs: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.outputs)


def environment() -> dict[str, str]:
    """A new shell's: CPU only, one thread a rank, no rank variables of a process group that the tests run in; and the package
    of this checkout, whichever is installed."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}


def ranks(run: Path, variable: str = "RANK", **others: str) -> dict[int, int]:
    """Processes of a run that some launcher has started, without their data workers. By ``variable`` of their environment, in
    which ``others`` are as well."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "ppid"]):
        words, variables = process.info["cmdline"] or [""], process.info["environ"] or {}
        if "python" in words[0] and str(run) in words and variable in variables and others.items() <= variables.items():
            found.append(process)
    pids = {process.pid for process in found}
    return {int(process.info["environ"][variable]): process.pid for process in found if process.info["ppid"] not in pids}


def wait_until_gone(pids: Iterable[int], limit_s: float) -> None:
    """Until none of them runs; whoever is left is ended, and a failure."""
    there = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            there.append(psutil.Process(pid))
    begun = time.monotonic()
    while there := [process for process in there if _runs(process)]:
        if time.monotonic() - begun > limit_s:
            for process in there:
                process.kill()
            raise AssertionError(f"{len(there)} are left: {there}")
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(world: int, arguments: list[str], folder: Path, **more: str) -> list[subprocess.Popen[str]]:
    """``python ARGUMENTS`` on ``world`` ranks, each in a session of its own, with ``more`` in its environment; output goes to
    files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = environment() | more | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(world):
        with (folder / f"rank{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
    return ranks


def kill(ranks: list[subprocess.Popen[str]]) -> None:
    """SIGKILL the ranks and their workers."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def finish(
    ranks: list[subprocess.Popen[str]], folder: Path, meanwhile: Callable[[], None] | None = None, limit_s: float = LIMIT_S
) -> Ended:
    """Wait for all ranks, after ``meanwhile``; whatever happens, none is left running."""
    try:
        if meanwhile is not None:
            meanwhile()
        codes = [rank.wait(timeout=limit_s) for rank in ranks]
    finally:
        kill(ranks)
    return Ended(codes, [(folder / f"rank{rank}.log").read_text() for rank in range(len(ranks))])


def launch(world: int, arguments: list[str], folder: Path, **more: str) -> Ended:
    return finish(start(world, arguments, folder, **more), folder)


def command(*words: str, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """A command as typed in the activated environment; nothing of it is left running."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment() | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def assert_one_line(ended: Ended, code: int, *parts: str) -> None:
    """Every rank ends with ``code``; together they say one line of ours, with all ``parts``, and print no traceback."""
    assert set(ended.codes) == {code}, ended.text
    assert "Traceback" not in ended.text, ended.text
    lines = [line for line in ended.text.splitlines() if line.startswith("xar-scale: ")]
    assert len(lines) == 1, ended.text
    assert all(part in lines[0] for part in parts), lines[0]
