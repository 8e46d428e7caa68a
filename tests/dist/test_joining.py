"""Joining the process group."""

import subprocess
import sys

import psutil

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
import signal, sys, time
from pathlib import Path
import torch
from xar_scale import dist

def told(number, frame):
    Path(sys.argv[1]).touch()
    dist.leave(0)

signal.signal(signal.SIGTERM, told)
dist.init(torch.device("cpu"))
print("joined", flush=True)
time.sleep(100)
"""
LAUNCHER = 'import subprocess, sys; subprocess.run([sys.executable, "-c", *sys.argv[1:]])'


def test_a_launcher_that_is_killed_leaves_no_rank_training(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path / "told")]
    kept = environment() | {"TORCHELASTIC_RUN_ID": "one"}  # as torchrun sets it; without it a rank may outlive its parent
    with subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "joined\n"
        (rank,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        wait_until_gone([rank.pid], 60)
    assert (tmp_path / "told").exists()
