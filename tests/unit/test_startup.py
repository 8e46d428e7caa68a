"""What is refused or reported when a run starts: another job in its folder, weights that are not as they were written."""

import errno
import fcntl
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.processes import environment
from tests.unit.foreign_checkpoints import reshard
from tests.unit.tiny_run import CONFIG, Run
from xar_scale import background, startup
from xar_scale import train as training
from xar_scale.checkpoint import store
from xar_scale.checkpoint.load import check_resumable
from xar_scale.checkpoint.manifest import checkpoint_paths, newest_valid, read_manifest, step_of
from xar_scale.checkpoint.mirror import Mirror, StoreError
from xar_scale.cli import main
from xar_scale.config import override
from xar_scale.data.faults import BadSamples, Fault
from xar_scale.data.loader import LatentDataset
from xar_scale.engines import Engine
from xar_scale.errors import ConfigError, DataError, FileError, HangError, PreemptedError, StoppedError
from xar_scale.evaluate.digits import cache_digits
from xar_scale.model.xar import meta_model
from xar_scale.startup import RunLock, first_weights, same_kernels
from xar_scale.stopping import StopRequests

SMALL = ("train.engine=single", "model.width=16", "model.heads=2", "train.global_batch=8")
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in the folder; it ends when its input is closed."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "lock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_jobs_do_not_train_in_one_folder(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setattr(startup.time, "sleep", lambda seconds: None)
    refused = pytest.raises(FileError, match="another process is still training here; stop it, or use another")
    with RunLock(tmp_path, StopRequests(tmp_path)) as lock, refused:
        lock.take()
    assert capsys.readouterr().out == f"{tmp_path}: another process is training here; waiting for it to exit\n"


def test_a_job_that_is_exiting_is_waited_for_and_the_lock_is_released(tmp_path, holder, monkeypatch):
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            holder.kill()
            holder.wait()

    monkeypatch.setattr(startup.time, "sleep", pause)
    for _ in range(2):
        with RunLock(tmp_path, StopRequests(tmp_path)) as lock:
            lock.take()
            assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
            lock.take()
    assert len(pauses) == 3


def test_a_checkpoint_written_while_waiting_for_the_lock_is_resumed_from(tmp_path, monkeypatch, capsys):
    """The lock comes before the checkpoint is chosen."""
    cache_digits(tmp_path / "data", samples_per_shard=500)
    steps = [f"data.path={tmp_path / 'data'}", "train.checkpoint_every=2", "data.workers=0", "optim.warmup_steps=1", *SMALL]
    words = ["train", "--recipe", "digits", "--run-dir", str(tmp_path / "run"), *steps]
    assert main([*words, "train.steps=2"]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "later")
    assert main([*words, "train.steps=4", "--run-dir", str(tmp_path / "later")]) == 0

    def pause(seconds):  # until then the other job writes
        shutil.copytree(tmp_path / "later" / "checkpoints", tmp_path / "run" / "checkpoints", dirs_exist_ok=True)
        holder.kill()
        holder.wait()

    command = [sys.executable, "-c", HOLDER, tmp_path / "run" / "lock"]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(startup.time, "sleep", pause)
        assert main([*words, "train.steps=5"]) == 0
    assert "step-00000004 at step 4" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("damaged*")] == []


def test_checkpoints_that_another_job_wrote_meanwhile_are_not_set_aside(train, tmp_path, capsys, monkeypatch):
    """Neither job found a folder, so there was nothing to lock."""
    assert main([*train, "--run-dir", str(tmp_path / "other")]) == 0
    take = RunLock.take

    def taken(lock):
        shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints", dirs_exist_ok=True)
        take(lock)

    with monkeypatch.context() as patch:
        patch.setattr(RunLock, "take", taken)
        assert main(train) == 74
    assert "another job started this run and wrote step-00000002; --resume auto resumes" in capsys.readouterr().err
    assert main([*train, "train.steps=3"]) == 0
    assert "resumed from" in capsys.readouterr().out


def fail_in_step(monkeypatch, step, error):
    """Have the data of ``step`` be bad: the storage is at fault (FileError), or there is no budget for a bad sample."""
    attempts, new_faults = [], BadSamples.new_faults

    def failing(bad, faults):
        attempts.append(0)
        fault = Fault("a", 1, error, fatal=not isinstance(error, DataError))
        return new_faults(bad, [fault] if len(attempts) > step else faults)

    monkeypatch.setattr(BadSamples, "new_faults", failing)


@pytest.mark.parametrize("error", [DataError("bad"), FileError("gone")])
def test_an_error_of_the_data_loses_no_training(train, tmp_path, monkeypatch, capsys, error):
    """The checkpoint that is being written is finished, then one of the last step is written. The run resumes exactly."""
    write, six = store.write_file, [*train, "train.steps=6"]
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_file", lambda *arguments: time.sleep(1) or write(*arguments))
        fail_in_step(patch, 3, error)
        assert main(six) == error.exit_code
    paths = checkpoint_paths(tmp_path / "run")
    assert [path.name for path in paths] == ["step-00000002", "step-00000003"]
    assert read_manifest(paths[-1]).manifest.bad_samples == []  # the step was not taken
    reason = f"{error}{' (bad samples: 1, data.max_bad_samples is 0)' if error.exit_code == 65 else ''}"
    said = capsys.readouterr().out
    assert f"{reason}; saving a checkpoint of step 3 before the run exits\n" in said and f"checkpoint {paths[-1]}\n" in said
    assert main(six) == main([*six, "--run-dir", str(tmp_path / "undisturbed")]) == 0
    assert "step-00000003 at step 3" in capsys.readouterr().out
    resumed, undisturbed = (newest_valid(tmp_path / run).manifest for run in ("run", "undisturbed"))
    assert resumed.step == 6 and resumed.files == undisturbed.files


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_stop_request_does_not_wait_for_data_that_do_not_come(train, tmp_path, monkeypatch, capsys, step):
    """SLURM kills the job half a minute after the signal."""
    six, read, asked = (
        [*train, "train.steps=6", "data.workers=1"],
        LatentDataset.__getitems__,
        training.Training._give_up_waiting,
    )
    with monkeypatch.context() as patch:

        def blocked(dataset, numbers):
            time.sleep(1000 * (numbers[0] == step * dataset.config.train.global_batch))
            return read(dataset, numbers)

        def preempted(run, waited):
            os.kill(os.getpid(), signal.SIGUSR2)
            return asked(run, waited)

        patch.setattr(training, "STOP_PATIENCE_S", 2.0)
        patch.setattr(training.Training, "_give_up_waiting", preempted)
        patch.setattr(LatentDataset, "__getitems__", blocked)
        assert main(six) == 75
    paths, captured = checkpoint_paths(tmp_path / "run"), capsys.readouterr()
    assert [step_of(path) for path in paths] == {0: [], 2: [2], 3: [2, 3]}[step]
    saved = "a checkpoint is written, the same command resumes from it" if step else "no checkpoint of it is written"
    assert captured.err == f"xar-scale: stopped after step {step} of 6 (SIGUSR2 to rank 0): {saved}\n"
    assert captured.out.count(f"stopped while waiting for data; saving a checkpoint of step {step} ") == (step == 3)
    assert main(six) == main([*six, "--run-dir", str(tmp_path / "undisturbed")]) == 0
    resumed, undisturbed = (newest_valid(tmp_path / run).manifest for run in ("run", "undisturbed"))
    assert resumed.step == 6 and resumed.files == undisturbed.files


def test_a_checkpoint_before_the_end_of_a_hang_has_a_time_limit_and_others_have_none(train, tmp_path, monkeypatch):
    """The storage of the run may hang as well."""
    watchdogs, timed = [], []

    class Known(training.Watchdog):
        def __init__(self, *of):
            super().__init__(*of)
            watchdogs.append(self)

    def save(store_, *manifests, save=store.Store.save):
        timed.append(watchdogs[-1]._current is not None)
        save(store_, *manifests)

    monkeypatch.setattr(training, "Watchdog", Known)
    monkeypatch.setattr(store.Store, "save", save)
    for number, error in enumerate((HangError("late"), FileError("gone"))):
        with monkeypatch.context() as patch:
            fail_in_step(patch, 3, error)
            assert main([*train, "train.steps=6", "--run-dir", str(tmp_path / str(number))]) == error.exit_code
    assert timed == [False, True, False, False]  # the regular one of step 2, and the last


@pytest.mark.parametrize("step", [0, 2])
def test_an_error_of_the_data_repeats_no_checkpoint(train, tmp_path, monkeypatch, step):
    fail_in_step(monkeypatch, step, FileError("gone"))
    saves = []
    monkeypatch.setattr(store.Store, "save", lambda *arguments, save=store.Store.save: saves.append(0) or save(*arguments))
    assert main([*train, "train.steps=6"]) == 74
    assert len(saves) == len(checkpoint_paths(tmp_path / "run")) == step / 2


def test_an_error_of_the_data_saves_no_state_that_is_not_finite(train, tmp_path, monkeypatch):
    fail_in_step(monkeypatch, 3, FileError("gone"))
    monkeypatch.setattr(
        Engine, "ranks_with_bad_state", lambda *_: [0] if (tmp_path / "run/checkpoints/latest").exists() else []
    )
    assert main([*train, "train.steps=6"]) == 74
    assert [path.name for path in checkpoint_paths(tmp_path / "run")] == ["step-00000002"]


def test_an_error_of_the_data_waits_for_one_attempt_at_an_upload(train, tmp_path, monkeypatch):
    """The store may be the same one that does not give the data."""
    attempts = []

    def unreachable(*_):
        attempts.append(0)
        raise StoreError("down")

    fail_in_step(monkeypatch, 1, FileError("gone"))
    monkeypatch.setattr(Mirror, "upload", unreachable)
    assert main([*train, f"train.upload=file://{tmp_path}/copy"]) == 74
    assert len(attempts) == 1 and len(checkpoint_paths(tmp_path / "run")) == 1


def test_a_full_disk_does_not_hide_the_error_of_the_data(train, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    fail_in_step(monkeypatch, 1, DataError("bad"))
    monkeypatch.setattr(store, "write_file", full)
    monkeypatch.setattr(store, "FINAL_ATTEMPTS", 1)
    assert main(train) == 65
    said = capsys.readouterr()
    assert "step-00000001: given up after 1 attempts: x: No space left on device" in said.out
    assert "xar-scale: bad (bad samples: 1" in said.err


def test_a_closed_terminal_stops_the_run_with_a_checkpoint(train, tmp_path):
    """Output after that goes nowhere."""
    words = [sys.executable, "-m", "xar_scale", *train, "train.steps=100000", f"train.upload=file://{tmp_path}/copy"]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
        os.execvpe(words[0], words, environment())
    said = b""
    while b"copy of checkpoint" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 76
    newest = checkpoint_paths(tmp_path / "run")[-1]
    assert checkpoint_paths(tmp_path / "copy")[-1].name == newest.name


@pytest.fixture
def train(folder, tmp_path):
    """Arguments that train two steps, in ``run``."""
    steps = ["train.steps=2", "train.checkpoint_every=2", "data.workers=0", "optim.warmup_steps=1"]
    return ["train", "--recipe", "digits", "--run-dir", str(tmp_path / "run"), f"data.path={folder / 'data'}", *steps, *SMALL]


def test_an_unwritable_mirror_is_refused_before_a_new_run_starts(train, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    to = f"train.upload=file://{tmp_path / 'file'}/copy"
    assert main(train) == 0
    for more in ([], ["--resume", str(tmp_path / "run")]):
        assert main([*train, to, "train.steps=3", "--run-dir", str(tmp_path / "new"), *more]) == 74
        assert f"file://{tmp_path / 'file'}/copy/checkpoints cannot be written: NotADirectory" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    monkeypatch.setattr(background.time, "sleep", lambda seconds: None)
    assert main([*train, to, "train.steps=3"]) == 74  # a run in progress continues
    assert newest_valid(tmp_path / "run").manifest.step == 3


def test_a_mirror_of_another_run_leaves_nothing_in_the_run_folder(train, tmp_path, capsys):
    other, own = (f"train.upload=file://{tmp_path / name}" for name in ("other", "own"))
    assert main([*train, other]) == 0
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    assert main([*train, other, "model.width=32"]) == 78
    said = f"{other.replace('=', ' ')}: model.width is 32, checkpoint step-00000002 was made with 16: not an exact continuation"
    assert capsys.readouterr().err == f"xar-scale: {said}\n" and not (tmp_path / "run").exists()
    assert main([*train, own, "model.width=32"]) == 0


def test_a_stopped_run_exits_as_stopped_even_if_its_upload_fails(train, tmp_path, capsys, monkeypatch):
    def upload(*_):
        raise FileError("refused")

    monkeypatch.setattr(Mirror, "upload", upload)
    monkeypatch.setattr(background.time, "sleep", lambda seconds: None)
    to = f"train.upload=file://{tmp_path / 'copy'}"
    assert main([*train, to, "--stop-after", "0s"]) == 76
    assert "given up after 6 attempts: refused" in capsys.readouterr().out
    assert main([*train, to]) == 74  # the run is complete, and no later run would upload that checkpoint


def test_a_new_run_resumes_from_the_newest_valid_checkpoint_of_another(train, tmp_path, capsys):
    more = ["train.checkpoint_every=1", "train.steps=3"]
    assert main([*train, *more]) == 0
    next((tmp_path / "run" / "checkpoints" / "step-00000003").glob("*.safetensors")).write_bytes(b"")
    assert main([*train, *more, "--run-dir", str(tmp_path / "new"), "--resume", str(tmp_path / "run")]) == 0
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert main([*train, "--run-dir", str(tmp_path / "newer"), "--resume", str(tmp_path / "run")]) == 64
    assert f"no checkpoint in {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, StoppedError), (signal.SIGUSR2, PreemptedError)])
def test_a_stop_request_ends_the_wait_for_the_lock(tmp_path, holder, number, kind):
    (tmp_path / "lock").write_text("process 7 on node3")
    stops = StopRequests(tmp_path)
    refused = pytest.raises(kind, match="stopped while waiting for process 7 on node3 to release .*: nothing was started")
    with stops.listening(), RunLock(tmp_path, stops) as lock, refused:
        os.kill(os.getpid(), number)
        lock.take()


def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunLock(tmp_path, StopRequests(tmp_path)) as lock:
        lock.take()
    assert (
        "cannot be locked, so another job training in it would go unnoticed: Operation not supported" in capsys.readouterr().out
    )


def test_ranks_with_different_kernels_are_refused(monkeypatch):
    """One of hundreds of nodes without a compiler would slow down all of them unnoticed."""
    ranks = [("attention flash", "node1"), ("attention flash", "node1"), ("attention masked", "node2")]
    monkeypatch.setattr(startup.dist, "gather_objects", lambda mine: ranks)
    with pytest.raises(ConfigError, match=r"^rank 0 \(node1\) would use attention flash, rank 2 \(node2\) attention masked: "):
        same_kernels("attention flash")
    del ranks[2]
    assert same_kernels("attention flash") == "attention flash"


def test_training_compares_the_kernels_of_its_ranks_before_it_writes_anything(train, tmp_path, monkeypatch):
    def refuse(kernels):
        assert kernels.startswith("attention ")
        raise ConfigError("they differ")

    monkeypatch.setattr(training, "same_kernels", refuse)
    assert main(train) == 78 and not (tmp_path / "run").exists()


def test_only_rank_0_looks_at_the_run_folder_before_it_is_made(tmp_path, monkeypatch):
    """A client of NFS remembers that a folder is not there."""

    class Unseen(type(tmp_path)):
        def is_dir(self):
            raise AssertionError("another rank looks")

    begun = []
    monkeypatch.setattr(training.dist, "rank", lambda: 1)
    monkeypatch.setattr(training, "_train", lambda *of: begun.append(of))
    training.train(CONFIG, Unseen(tmp_path / "run"))
    assert len(begun) == 1
    monkeypatch.setattr(training.dist, "rank", lambda: 0)
    with pytest.raises(AssertionError, match="another rank looks"):
        training.train(CONFIG, Unseen(tmp_path / "run"))


@pytest.mark.parametrize("target", ["pth", "safetensors", "universal"])
def test_initial_weights_that_have_changed_since_they_were_written_are_refused(tmp_path, target):
    Run(tmp_path / "run").save()
    assert reshard(tmp_path / "run", tmp_path / "made", "--to", target) == 0
    config = CONFIG.from_dict(override(CONFIG.to_dict(), [f"train.init_from={tmp_path / 'made'}"]))
    with first_weights(meta_model(config.model), config, None) as weights:
        assert len(list(weights)) > 10
    spoilt = max((tmp_path / "made").rglob("*.*"), key=lambda path: path.stat().st_size)
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 1
    spoilt.write_bytes(content)
    refused = pytest.raises(DataError, match=f"{spoilt.name} is corrupt")
    with refused, first_weights(meta_model(config.model), config, None):
        pass


def test_a_checkpoint_converted_from_another_format_can_initialise_but_not_resume(tmp_path):
    run = Run(tmp_path / "run")
    run.save()
    assert reshard(tmp_path / "run", tmp_path / "universal", "--to", "universal") == 0
    assert reshard(tmp_path / "universal", tmp_path / "made", "--to", "xar-scale") == 0
    with pytest.raises(ConfigError, match="converted from another format and has no run to resume: use --init-from"):
        check_resumable(read_manifest(tmp_path / "made"), run.config, run.info)
