"""A real SLURM on this machine: a controller and two nodes on loopback, with keys of their own, ended with the test."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.processes import environment, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NODES = ("n0", "n1")
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=n0,n1 PriorityTier=2 MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be none here."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{lacking[0]} is not installed (Debian: slurmctld slurmd slurm-client munge)" if lacking else None


@dataclass
class Slurm:
    folder: Path
    environment: dict[str, str]

    def run(self, *words: object) -> str:
        done = subprocess.run(
            list(map(str, words)), env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, folder: Path, *words: object, **environment: str) -> int:
        """From ``folder``. Returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)],
            env=self.environment | environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def state(self, job: int) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def now(self, job: int) -> None:
        """Start a job that was queued again without SLURM's two minutes of delay."""
        self.until(lambda: self.state(job)["JobState"] == "PENDING")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def until(self, what: Callable[[], object], limit_s: float = 300, why: Callable[[], str] = str) -> None:
        begun = time.monotonic()
        while not what():
            assert time.monotonic() - begun < limit_s, why()
            time.sleep(0.05)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Up, with both nodes idle."""
    munge = folder / "munge"
    for path in (munge, folder / "state", *(folder / f"spool-{node}" for node in NODES)):
        path.mkdir(parents=True)
    munge.chmod(0o700)
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o600)
    ports = {node: free_port() for node in NODES}
    nodes = "\n".join(f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[node]} CPUs=2" for node in NODES)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, controller=free_port(), nodes=nodes))
    here = Slurm(folder, environment() | {"SLURM_CONF": str(folder / "slurm.conf")})
    files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    daemons = [["munged", "--foreground", "--force", *(f"--{name}={munge / file}" for name, file in files.items())]]
    daemons += [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in daemons:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(daemon, env=here.environment, start_new_session=True, **quiet))
            if daemon[0] == "munged":
                here.until((munge / "socket").exists, 10)
        here.until(lambda: _idle(here), 30, lambda: (folder / "slurmctld.log").read_text())
        yield here
    finally:
        with contextlib.suppress(Exception):
            here.run("scancel", "--user=root")
            here.until(lambda: not here.run("squeue", "--noheader").strip(), 60)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(timeout=100)
            except subprocess.TimeoutExpired:
                process.kill()


def _idle(here: Slurm) -> bool:
    command = ["sinfo", "--partition=main", "-Nho", "%N %t"]
    shown = subprocess.run(command, env=here.environment, capture_output=True, text=True).stdout
    return sorted(shown.split("\n")) == ["", "n0 idle", "n1 idle"]
