"""Signals, the clock and a file become stop requests; srun's variables become torch's."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from xar_scale import cli, dist, slurm, stopping
from xar_scale.errors import ConfigError, PreemptedError, StoppedError, UsageError
from xar_scale.stopping import StopRequests


@pytest.fixture
def stops(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    yield StopRequests(tmp_path)
    signal.signal(signal.SIGHUP, hangup)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGUSR2, PreemptedError),
        (signal.SIGTERM, StoppedError),
        (signal.SIGINT, StoppedError),
        (signal.SIGHUP, StoppedError),  # its terminal was closed
    ],
)
def test_a_signal_is_a_stop_request(stops, number, kind):
    assert not stops.requested()
    with stops.listening():
        os.kill(os.getpid(), number)
    assert stops.requested()
    error = stops.error("stopped after step 3 of 9")
    assert type(error) is kind and error.exit_code == (75 if kind is PreemptedError else 76)
    name = signal.Signals(number).name
    assert (
        str(error) == f"stopped after step 3 of 9 ({name} to rank 0): a checkpoint is written, the same command resumes from it"
    )


def test_under_nohup_a_terminal_that_closes_is_no_stop_request(stops):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stops.listening():
        os.kill(os.getpid(), signal.SIGHUP)
    assert not stops.requested() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_preemption_takes_precedence_over_other_stop_requests(stops):
    with stops.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)
    assert type(stops.error("")) is PreemptedError


def test_the_stop_file_is_checked_once_a_second_and_removed(stops, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    assert not stops.requested()
    stops.file.touch()
    now[0] += 0.9
    assert not stops.requested()
    now[0] += 0.2
    assert stops.requested()
    assert "STOP exists" in str(stops.error(""))
    stops.remove_file()
    assert not stops.file.exists()
    assert stops.requested()  # a request stays


def test_only_rank_0_checks_the_time_limit(stops, monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    late = StopRequests(tmp_path, after=5)
    now[0] += 4.9
    assert not late.requested()
    now[0] += 0.2
    assert late.requested() and "--stop-after 5 s" in str(late.error(""))
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert not late.requested()


def test_a_second_ctrl_c_ends_it_at_once_but_not_the_first_one_forwarded(tmp_path):
    program = """
import os, signal, sys, time
from pathlib import Path
from xar_scale import stopping
now = [100.0]
stopping.time.monotonic = lambda: now[0]
stops = stopping.StopRequests(Path("."))
with stops.listening():
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += stopping.AGAIN_S
    os.kill(os.getpid(), signal.SIGINT)
    print("heard", flush=True)
    now[0] += 0.1
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert (done.returncode, done.stdout) == (130, "heard\n"), done.stderr


@pytest.mark.parametrize(
    ("said", "seconds"), [("30s", 30), ("90m", 5400), ("3h50m", 13800), ("2d", 172800), ("1d2h3m4s", 93784)]
)
def test_durations(said, seconds):
    assert cli._seconds(said) == seconds


@pytest.mark.parametrize("said", ["", "5", "h", "5 m", "-5m", "5m3"])
def test_invalid_durations(said):
    with pytest.raises(UsageError, match="is not a duration such as"):
        cli._seconds(said)


TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu-a[007-009,011]",
}


def test_a_task_of_srun_is_a_rank():
    assert slurm.rank_variables(TASK) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu-a007",
        "MASTER_PORT": "16713",
    }


def test_a_batch_script_and_a_shell_are_no_ranks():
    assert slurm.rank_variables({name: TASK[name] for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID")}) == {}
    assert slurm.rank_variables({}) == {}


def test_more_ranks_than_gpus_on_a_node_are_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(dist.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(dist.socket, "gethostname", lambda: "node16")
    monkeypatch.setattr(os, "environ", {"RANK": "12", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"})
    assert dist.local_device() == torch.device("cuda", 3)
    os.environ |= {"RANK": "13", "LOCAL_RANK": "4"}
    with pytest.raises(ConfigError, match="^node16 has 8 ranks and 4 GPUs: none for local rank 4$") as raised:
        dist.local_device()
    assert raised.value.rank == 13  # the rank that reports it


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"),
        ("n[0-1]", "n0"),
        ("login1,n[0-1]", "login1"),
        ("gpu-a[001-004,007],login1", "gpu-a001"),
        ("rack[1-2]n[03,05]", "rack1n03"),
        ("n[5,7-9].site.org", "n5.site.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert slurm.first_host(nodes) == first


def test_tasks_of_each_node():
    assert slurm.tasks_per_node("2(x3),1") == [2, 2, 2, 1] and slurm.tasks_per_node("4") == [4]


def test_variables_that_a_launcher_has_set_are_kept(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    environ = dict(os.environ)
    monkeypatch.setattr(os, "environ", environ)
    dist.adopt_launcher()
    assert environ["MASTER_ADDR"] == "10.0.0.1" and environ["RANK"] == "5" and environ["MASTER_PORT"] == "16713"
    environ["RANK"], environ["SLURM_PROCID"] = "3", "6"
    dist.adopt_launcher()
    assert environ["RANK"] == "3"
