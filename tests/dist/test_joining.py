"""Joining the process group."""

import subprocess
import sys

import psutil
import pytest

from tests.processes import environment, launch, wait_until_gone

PROGRAM = """
import sys, time
from pathlib import Path
import torch, torch.distributed
from xar_scale import dist

if dist.rank() == 1:  # late: the other rank already has all it needs from this one
    join = torch.distributed.init_process_group
    def slowly(*words, **named):
        join(*words, **named)
        time.sleep(2)
        Path(sys.argv[1]).touch()
    torch.distributed.init_process_group = slowly
dist.init(torch.device("cpu"))
dist.leave(3 + Path(sys.argv[1]).exists())
"""


def test_no_rank_continues_before_all_have_joined(tmp_path):
    ended = launch(2, ["-c", PROGRAM, str(tmp_path / "joined")], tmp_path)
    assert ended.codes == [4, 4], ended.text


RANK = """
import os, signal, sys, time
from pathlib import Path
import torch
from xar_scale import dist
from xar_scale.errors import ProcessError

def told(number, frame):
    Path(sys.argv[1]).touch()
    dist.leave(0)

signal.signal(signal.SIGTERM, told)
if sys.argv[2] == "before":
    print("ready", flush=True)
    while os.getppid() == dist.PARENT:
        time.sleep(0.01)
try:
    dist.init(torch.device("cpu"))
except ProcessError as error:
    assert sys.argv[2] == "before" and error.rank == 0
    told(None, None)
print("ready", flush=True)
time.sleep(100)
"""
LAUNCHER = 'import subprocess, sys; subprocess.run([sys.executable, "-c", *sys.argv[1:]])'


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_launcher_that_is_killed_leaves_no_rank_training(tmp_path, when):
    """Before or after the rank has asked the kernel for a signal."""
    command = [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path / "told"), when]
    kept = environment() | {"TORCHELASTIC_RUN_ID": "one"}  # as torchrun sets it; without it a rank may outlive its parent
    with subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        (rank,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        wait_until_gone([rank.pid], 60)
    assert (tmp_path / "told").exists()
