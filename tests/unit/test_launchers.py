"""What the launchers' shell code decides: the run folder, the exit code, whether to restart. And that shellcheck passes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT, environment


def bash(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", f"source launchers/common.sh; {script}", "bash", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.fixture
def launch(tmp_path):
    """launchers/deepspeed.sh where ``deepspeed`` and ``nvidia-smi`` only print their arguments."""
    for name, script in (("deepspeed", 'echo "deepspeed $* DS=${DS_ACCELERATOR:-}"'), ("nvidia-smi", "cat $GPU_LIST")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def launch(gpus: str, **variables: str) -> str:
        (tmp_path / "gpus").write_text(gpus)
        kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPU_LIST": str(tmp_path / "gpus"), "MASTER_PORT": "1"} | variables
        done = subprocess.run(
            ["launchers/deepspeed.sh", "train", "a=1"], cwd=ROOT, env=kept | given, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()[-1]

    return launch


def test_the_launcher_chooses_the_ranks(launch):
    gpus = "".join(f"GPU {n}: NVIDIA (UUID: x)\n" for n in range(6))
    rest = "--master_port 1 --no_local_rank --module xar_scale train a=1 DS="
    assert launch(gpus) == f"deepspeed --quiet --include localhost:0,1,2,3 {rest}"
    assert launch(gpus, PROCESSES="6") == f"deepspeed --quiet --include localhost:0,1,2,3,4,5 {rest}"
    assert launch(gpus, CUDA_VISIBLE_DEVICES="2,5") == f"deepspeed --quiet --include localhost:2,5 {rest}"
    for nothing in ("", "No devices were found\n"):
        assert launch(nothing) == f"deepspeed --quiet --num_gpus 2 {rest}cpu"
    assert launch(gpus, CUDA_VISIBLE_DEVICES="") == f"deepspeed --quiet --num_gpus 2 {rest}cpu"
    assert launch("", PROCESSES="3") == f"deepspeed --quiet --num_gpus 3 {rest}cpu"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean():
    scripts = [*sorted((ROOT / "launchers").glob("*.sh")), ROOT / "launchers" / "slurm.sbatch", ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["train", "--recipe", "digits", "--run-dir", "/runs/h"], "/runs/h"),
        (["train", "--run-dir=/runs/h", "--recipe", "digits"], "/runs/h"),
        (["train", "--recipe", "digits"], "runs/digits"),
        (["train", "--recipe=digits", "train.steps=3"], "runs/digits"),
    ],
)
def test_the_run_folder_is_the_one_that_train_uses(words, folder):
    assert bash('run_folder "$@"', *words).stdout == f"{folder}\n"


def test_the_exit_code_is_the_one_that_the_ranks_wrote(tmp_path):
    note = tmp_path / "note"
    script = f'XAR_SCALE_EXIT_FILE={note}; code=$1; take_exit_code; echo "$code"'
    assert bash(script, 137).stdout == "137\n"
    note.write_text("75")
    assert bash(script, 1).stdout == "75\n"


def test_a_process_that_exits_during_a_signal_has_its_code_or_the_signals():
    script = "trap : TERM; for _ in {1..40}; do bash -c 'kill -TERM $PPID; exit 76' & wait_for $!; echo $code; done"
    done = bash(script)
    assert done.returncode == 0 and set(done.stdout.split()) <= {"76", "143"} and len(done.stdout.split()) == 40


@pytest.mark.parametrize("of_a_job", [True, False])
def test_launchers_of_a_job_share_the_exit_code_of_its_ranks(tmp_path, of_a_job):
    """One launcher per node: when the first exits, the others get SIGTERM before they have read the ranks' exit code."""
    note, told = tmp_path / "note", tmp_path / "told"
    given = f"XAR_SCALE_EXIT_FILE={note}" if of_a_job else "unset XAR_SCALE_EXIT_FILE"
    rank = f'[ ! -s "$XAR_SCALE_EXIT_FILE" ] || exit 9; echo "$XAR_SCALE_EXIT_FILE" >{told}; echo 75 >"$XAR_SCALE_EXIT_FILE"'
    note.write_text("78")  # from the previous start
    script = f"{given}; RUN={tmp_path} RESTARTS=0; launch bash -c '{rank}; exit 1'"
    assert bash(script).returncode == 75
    assert note.read_text() == ("75\n" if of_a_job else "78")
    assert (told.read_text() == f"{note}\n") == of_a_job and Path(told.read_text().strip()).exists() == of_a_job


AGAIN = 'RESTARTS=$1; run=$2; shift 2; for code; do start_again "$run" "$code" >/dev/null && echo yes || echo no; done'


@pytest.mark.parametrize("code", [0, 64, 65, 70, 76, 78, 130])
def test_a_run_that_would_end_alike_is_not_restarted(tmp_path, code):
    assert bash(AGAIN, 3, tmp_path, code).stdout == "no\n"


@pytest.mark.parametrize("code", [1, 69, 71, 74, 75, 137, 143, 247])
def test_others_are_restarted_up_to_the_limit(tmp_path, code):
    assert bash(AGAIN, 2, tmp_path, code, code, code).stdout == "yes\nyes\nno\n"
    assert bash(AGAIN, 0, tmp_path, code).stdout == "no\n"


def test_a_newer_checkpoint_resets_the_count(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    point = f"echo step-$n >{tmp_path}/checkpoints/latest"
    script = f"RESTARTS=1; for n in 1 2 3 3 3; do {point}; start_again {tmp_path} 1; done"
    done = bash(script)
    said = done.stdout.splitlines()
    assert [line.split(";")[1].split()[0] for line in said] == ["restart", "restart", "restart", "not"]
    assert said[-1] == "exit code 1; not restarted: 1 restarts since checkpoint step-3" and done.returncode == 1


@pytest.mark.parametrize("place", ["/nowhere/note", "{}/made/it's"])
def test_an_exit_file_that_is_unwritable_or_oddly_named_is_no_obstacle(tmp_path, place):
    """The job's file, in a container that lacks its folder; and the launcher's own file in any TMPDIR."""
    folder = Path(place.format(tmp_path))
    if own := str(tmp_path) in place.format(tmp_path):
        folder.mkdir(parents=True)
    given = f'unset XAR_SCALE_EXIT_FILE; export TMPDIR="{folder}"' if own else f"XAR_SCALE_EXIT_FILE={folder}"
    rank = 'echo "${XAR_SCALE_EXIT_FILE}"; exit 75'
    done = bash(f"{given}; RUN={tmp_path} RESTARTS=0; launch bash -c '{rank}'")
    assert (done.returncode, done.stderr) == (75, "") and str(folder) in done.stdout
    assert not own or not list(folder.iterdir())


def test_an_exit_file_that_is_being_written_is_no_empty_code(tmp_path):
    """A rank on another node truncates the file before it writes to it."""
    (tmp_path / "note").write_text("")
    script = f"XAR_SCALE_EXIT_FILE={tmp_path}/note; code=78; take_exit_code; echo $code; printf 75 >{tmp_path}/note; "
    assert bash(script + "take_exit_code; echo $code").stdout == "78\n75\n"


def test_a_stop_before_the_launcher_starts_prevents_the_start(tmp_path):
    asked = 'trap() { builtin trap "$@"; [ "${*: -1}" != TERM ] || kill -TERM $$; }'  # as soon as the handler is installed
    done = bash(f"{asked}; RUN={tmp_path} RESTARTS=3; launch touch {tmp_path}/begun")
    assert done.returncode == 76 and not (tmp_path / "begun").exists()


def test_a_stop_during_the_pause_prevents_the_restart(tmp_path):
    script = (
        f"source launchers/common.sh; RUN={tmp_path} RESTARTS=3 PAUSE=600; launch bash -c 'echo >>{tmp_path}/starts; exit 3'"
    )
    shell = subprocess.Popen(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "restart 1 since" in shell.stdout.readline()
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=100) == 3 and (tmp_path / "starts").read_text() == "\n"  # no restart
    shell.stdout.close()


def test_a_stop_waits_for_the_ranks_that_the_launcher_left_running(tmp_path):
    rank = f"trap 'sleep 1; echo written >{tmp_path}/checkpoint; exit' TERM; echo up; while true; do sleep 0.1; done"
    launcher = 'trap "exit 76" TERM; bash -c "$RANK" & while true; do sleep 0.1; done'
    late = 'kill() { builtin kill "$@" || return; [ "$1" = -0 ] || sleep 1; }'  # the process exits before the next wait
    script = f"source launchers/common.sh; {late}; RUN={tmp_path} RESTARTS=3 PAUSE=0; launch bash -c '{launcher}'"
    command = ["env", f"RANK={rank}", "bash", "-euo", "pipefail", "-c", script]
    shell = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert shell.stdout.readline() == "up\n"
    shell.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=100) == 76 and (tmp_path / "checkpoint").read_text() == "written\n"
    shell.stdout.close()


def test_a_zombie_is_not_waited_for():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    while "State:\tZ" not in Path(f"/proc/{ended.pid}/status").read_text():
        time.sleep(0.01)
    assert bash('alive "$1" && echo yes || echo no', ended.pid).stdout == "no\n"
    ended.wait()
    running = subprocess.Popen(["sleep", "60"])
    assert bash('alive "$1" && echo yes || echo no', running.pid).stdout == "yes\n"
    running.kill()
    running.wait()


class Batch:
    """launchers/slurm.sbatch with a fake SLURM: srun exits with ``code``; ``preempted`` is the job's PreemptTime."""

    SRUN = """echo "srun CPUS=${SRUN_CPUS_PER_TASK-} $*" >>"$CALLS"
[ "$CODE" -gt 128 ] || echo "$CODE" >"$XAR_SCALE_EXIT_FILE" # as ranks do
[ -z "$ASKED" ] || kill -TERM $PPID
exit $CODE"""
    SCONTROL = """case "$1 $2" in
'show hostnames') echo n0 ;;
'show job') echo "JobId=7 StartTime=2026-01-01T10:00:00 PreemptTime=$PREEMPTED Restarts=0" ;;
*) echo "scontrol $*" >>"$CALLS" ;;
esac"""

    def __init__(self, folder: Path, code: int, *words: str, asked: bool = False, preempted: str = "None", **more: str) -> None:
        programs, calls, self.run = folder / "bin", folder / "calls", folder / "run"
        programs.mkdir(exist_ok=True)
        for name, script in (("srun", self.SRUN), ("scontrol", self.SCONTROL)):
            (programs / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (programs / name).chmod(0o755)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "12"}
        job |= {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_SUBMIT_DIR": str(ROOT)}
        told = {"CALLS": str(calls), "CODE": str(code), "ASKED": "1" if asked else "", "PREEMPTED": preempted}
        path = {"PATH": f"{programs}:{os.environ['PATH']}"}
        self.done = subprocess.run(
            ["bash", ROOT / "launchers" / "slurm.sbatch", *(words or ("train", "--run-dir", self.run))],
            env=environment() | job | told | path | more,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=100,
        )
        self.calls = calls.read_text().splitlines() if calls.exists() else []
        self.requeued = "scontrol requeue 7" in self.calls


def test_a_job_is_one_task_per_rank_or_one_launcher_per_node_with_its_cores(tmp_path):
    assert Batch(tmp_path, 0).calls == [f"srun CPUS=12 --kill-on-bad-exit=1 python -m xar_scale train --run-dir {tmp_path}/run"]
    (_, call) = Batch(tmp_path, 0, LAUNCH="torchrun").calls
    assert call.startswith("srun CPUS= --kill-on-bad-exit=1 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none ")
    batch = Batch(tmp_path, 0, LAUNCH="mpirun")
    assert (batch.done.returncode, batch.done.stderr) == (64, "xar-scale: LAUNCH=mpirun is neither srun nor torchrun\n")


@pytest.mark.parametrize(
    ("code", "asked", "preempted", "again"),
    [
        (75, False, "None", True),
        (76, True, "None", False),
        (143, True, "None", False),  # cancelled before its ranks had signal handlers
        (143, False, "None", True),
        (76, True, "2026-01-01T10:00:30", True),
        (143, True, "2026-01-01T10:00:30", True),  # preempted before they had
        (76, True, "2026-01-01T09:00:00", False),  # an earlier start was preempted
        (78, True, "2026-01-01T10:00:30", False),
    ],
)
def test_a_job_is_requeued_unless_a_stop_was_requested(tmp_path, code, asked, preempted, again):
    batch = Batch(tmp_path, code, asked=asked, preempted=preempted)
    assert batch.requeued == again and f"ended with {code}" in batch.done.stdout
    assert batch.done.returncode == (75 if again and code == 76 else code)
    assert (batch.run / "restarts").exists() == again


def test_a_job_whose_restarts_cannot_be_counted_is_not_requeued_for_ever(tmp_path):
    for restarts in (1, 2, 3):
        assert Batch(tmp_path, 71).requeued and (tmp_path / "run" / "restarts").read_text() == f"none {restarts}\n"
        (tmp_path / "calls").unlink()
    batch = Batch(tmp_path, 71)
    assert not batch.requeued and "not restarted: 3 restarts since checkpoint none" in batch.done.stdout
    batch.run.rmdir()
    batch.run.touch()  # no folder can be created, as on a full disk
    batch = Batch(tmp_path, 71)
    assert not batch.requeued and f"not restarted: {batch.run}/restarts cannot be written" in batch.done.stdout


@pytest.mark.parametrize("number", ["BASH_VERSINFO[$(touch {}/ran; echo 0)]", "xyz", "1 2", "-5", "9" * 30])
def test_a_damaged_count_of_restarts_is_none_and_is_not_executed(tmp_path, number):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "restarts").write_text(f"none {number.format(tmp_path)}\n")
    batch = Batch(tmp_path, 71)
    assert batch.requeued and (batch.run / "restarts").read_text() == "none 1\n" and not (tmp_path / "ran").exists()


def test_jobs_without_a_run_folder_count_their_restarts_separately(tmp_path):
    of_others = ROOT / "runs" / "restarts"
    for number, restarts in (("700001", 1), ("700002", 1), ("700001", 2)):
        counted = ROOT / f".restarts-{number}"
        assert Batch(tmp_path, 71, "evaluate", "runs/h", SLURM_JOB_ID=number).done.returncode == 71
        assert counted.read_text() == f"none {restarts}\n" and not of_others.exists()
    for number in ("700001", "700002"):
        Batch(tmp_path, 0, "evaluate", "runs/h", SLURM_JOB_ID=number)
    assert not [*ROOT.glob(".restarts-70000?")]


def test_a_job_that_is_submitted_from_elsewhere_says_so(tmp_path):
    batch = Batch(tmp_path, 0, SLURM_SUBMIT_DIR=str(tmp_path))
    assert batch.done.returncode == 64 and batch.calls == []
    *_, said = batch.done.stderr.splitlines()  # after bash's own complaint
    assert (batch.done.stdout, said) == ("", f"xar-scale: {tmp_path} is not a checkout: run sbatch from one")


@pytest.mark.parametrize(
    ("launcher", "given", "said"),
    [
        (
            "deepspeed.sh",
            {"HOSTFILE": "/nowhere/hosts"},
            "HOSTFILE=/nowhere/hosts: no such file",
        ),  # DeepSpeed ignores it
        (
            "deepspeed.sh",
            {"HOSTFILE": "launchers/hostfile.example", "NODE_RANK": "0"},
            "MASTER_ADDR is not set: NODE_RANK needs the address of the first machine",
        ),
        ("torchrun.sh", {"NODES": "2"}, "MASTER_ADDR is not set: NODES above 1 needs the address of a node that all can reach"),
        ("slurm.sbatch", {}, "SLURM_SUBMIT_DIR is not set: submit this script with sbatch"),
    ],
)
def test_missing_addresses_and_hostfiles_are_refused(launcher, given, said):
    command = ["bash", f"launchers/{launcher}", "train", "--recipe", "digits"]
    done = subprocess.run(command, env=environment() | given, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr, done.stdout) == (64, f"xar-scale: {said}\n", "")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("given", ["PROCESSES=0", "PROCESSES=all", "RESTARTS=x", "PAUSE=-1", "MASTER_PORT=1e4"])
def test_settings_that_are_not_numbers_are_refused_before_anything_starts(launcher, given):
    """RESTARTS=x would otherwise restart for ever."""
    least = "0" if given.startswith(("RESTARTS", "PAUSE")) else "1"
    command = ["env", given, f"launchers/{launcher}.sh", "train"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == f"xar-scale: {given}: must be a whole number of at least {least}\n"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_more_processes_than_gpus_are_refused(launcher):
    given = {"CUDA_VISIBLE_DEVICES": "0,1", "PROCESSES": "3"}
    kept = {name: value for name, value in environment().items() if name != "DS_ACCELERATOR"} | given
    done = subprocess.run([f"launchers/{launcher}.sh"], env=kept, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (64, "xar-scale: PROCESSES=3, but only these GPUs are available: 0,1\n")


def test_processes_on_a_cpu_are_as_many_as_wanted():
    assert bash("DS_ACCELERATOR=cpu PROCESSES=3; enough_gpus 0,1 2; echo fine").stdout == "fine\n"


@pytest.mark.parametrize(("shown", "here"), [("0,3", "0,3\n"), ("-1", ""), ("", "\n")])
def test_gpus_are_those_in_cuda_visible_devices(shown, here):
    done = bash(f"export CUDA_VISIBLE_DEVICES={shown}; gpus_here")
    assert (done.returncode, done.stdout) == (0, here)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_missing_python_is_reported(launcher, tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    kept = environment() | {"PATH": str(tmp_path)}
    done = subprocess.run([f"launchers/{launcher}.sh"], env=kept, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 64 and done.stderr.startswith("xar-scale: python not found")


def test_the_variables_that_launchers_set_for_torch_exist_there():
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    known = "".join(path.read_text() for path in headers.glob("*.hpp"))
    names = set(re.findall(r"TORCH_[A-Z_]+", (ROOT / "launchers" / "common.sh").read_text()))
    assert len(names) >= 3 and not [name for name in names if f'"{name}"' not in known]
