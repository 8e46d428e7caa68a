"""Writing checkpoints while training continues: what is written, what training waits for, and failures of the disk."""

import errno
import os
import shutil
import threading
import time

import pytest

from tests.unit.tiny_run import Run, poll_until, same
from xar_scale import background, dist
from xar_scale.checkpoint import store
from xar_scale.checkpoint.load import load
from xar_scale.checkpoint.manifest import checkpoint_paths, newest_valid, verify
from xar_scale.errors import FileError


def names(run: Run) -> list[str]:
    return [path.name for path in checkpoint_paths(run.store.run)]


def begin(run: Run) -> None:
    run.train()
    run.store.save(run.manifest())


@pytest.fixture
def gate(monkeypatch):
    """An event: files are written while it is set."""
    gate, write = threading.Event(), store.write_file

    def gated(*arguments):
        assert gate.wait(20)
        return write(*arguments)

    monkeypatch.setattr(store, "write_file", gated)
    return gate


@pytest.fixture
def no_pauses(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def failing(monkeypatch, times: int, number: int = errno.ENOSPC) -> list[int]:
    """The next ``times`` files fail when they are flushed."""
    exact, left = os.fsync, [times]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number))
        exact(descriptor)

    monkeypatch.setattr("xar_scale.checkpoint.files.os.fsync", fsync)
    return left


def test_training_continues_and_the_state_at_the_time_of_the_save_is_written(tmp_path, gate):
    run, other = Run(tmp_path), Run(tmp_path, seed=1)
    begin(run)
    then = run.state()
    for _ in range(3):
        run.train()
        run.store.poll()
    assert names(run) == [] and not same(run.state(), then)
    gate.set()
    poll_until(run, lambda: run.store.newest is not None)
    load(verify(run.store.newest), other.engine, other.ema)
    assert same(other.state(), then)


def test_a_save_waits_for_the_one_before_it(tmp_path, gate):
    run = Run(tmp_path)
    begin(run)
    run.train()
    waited = run.store.stall_s
    threading.Timer(0.3, gate.set).start()
    run.store.save(run.manifest())
    assert run.store.stall_s - waited > 0.2
    assert names(run) == ["step-00000001"]
    run.store.finish()
    assert names(run) == ["step-00000001", "step-00000002"]


def test_the_stall_is_counted_without_the_writing(tmp_path, gate):
    run = Run(tmp_path)
    begin(run)
    waited = run.store.stall_s
    run.store.poll()
    gate.set()
    run.store.finish()
    assert 0 < waited == run.store.stall_s


def test_an_older_checkpoint_is_removed_only_after_a_newer_one_is_published(tmp_path, gate):
    run = Run(tmp_path, keep_last=1)
    gate.set()
    run.train()
    first = run.save()
    gate.clear()
    begin(run)
    for _ in range(5):
        run.store.poll()
    assert newest_valid(tmp_path).path == first
    gate.set()
    run.store.finish()
    assert names(run) == ["step-00000002"]


def test_keep_every(tmp_path):
    run = Run(tmp_path, keep_last=2, keep_every=3)
    for _ in range(8):
        run.train()
        run.save()
    assert names(run) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_a_disk_error_is_reported_and_the_same_state_written_later(tmp_path, monkeypatch, capsys, number):
    run, other = Run(tmp_path), Run(tmp_path, seed=1)
    failing(monkeypatch, 2, number)
    begin(run)
    then = run.state()
    for _ in range(4):  # steps, while the disk fails
        run.train()
        run.store.poll()
    poll_until(run, lambda: run.store.newest is not None)
    said = capsys.readouterr().out
    assert (
        said.count(f"model-00001-of-00001.safetensors: {os.strerror(number)}") == 2
        and f"{run.store.newest}: attempt 1 failed" in said
    )
    load(verify(run.store.newest), other.engine, other.ema)
    assert same(other.state(), then)


def test_retries_back_off(tmp_path, monkeypatch):
    run, left = Run(tmp_path), failing(monkeypatch, 100)
    begin(run)
    for _ in range(200):
        run.store.poll()
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint"):
                thread.join()
    assert 100 - left[0] == 7  # the first, and 2, 4, 8, ... polls after the one before


def test_a_checkpoint_that_cannot_be_written_is_given_up_for_the_next(tmp_path, monkeypatch, capsys):
    run, left = Run(tmp_path), failing(monkeypatch, 100)
    begin(run)
    poll_until(run, lambda: "attempt 1 failed" in capsys.readouterr().out)
    left[0] = 0
    begin(run)
    assert "step-00000001: given up for the next one" in capsys.readouterr().out
    run.store.finish()
    assert names(run) == ["step-00000002"]
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []


def test_the_last_checkpoint_gets_six_attempts_then_the_run_ends_with_the_disk_error(tmp_path, monkeypatch, no_pauses):
    run = Run(tmp_path)
    run.train()
    first = run.save()
    failing(monkeypatch, 100)
    begin(run)
    with pytest.raises(FileError, match=r"step-00000002: given up after 6 attempts: .*No space left on device"):
        run.store.finish()
    assert no_pauses == [1, 2, 4, 8, 16]
    assert newest_valid(tmp_path).path == first


def failing_in_turn(monkeypatch, name: str, times: int) -> None:
    """The next ``times`` calls of a function of the store fail with a disk error."""
    exact, left = getattr(store, name), [times]

    def fails(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return exact(*arguments)

    monkeypatch.setattr(store, name, fails)


def test_each_stage_has_six_attempts(tmp_path, monkeypatch, no_pauses):
    run = Run(tmp_path)
    failing(monkeypatch, 5)
    failing_in_turn(monkeypatch, "publish", 5)
    begin(run)
    run.store.finish()
    assert names(run) == ["step-00000001"] and no_pauses == 2 * [1, 2, 4, 8, 16]


def test_a_rank_that_succeeded_keeps_what_it_did_while_another_tries_again(tmp_path, monkeypatch, no_pauses, capsys):
    """Of hundreds of files one fails now and then: if all were written again, hardly an attempt would succeed."""
    written, left = [], [2]
    everywhere = dist.on_all_ranks

    def failing_elsewhere(work):
        result = everywhere(work)
        left[0] -= 1
        if left[0] >= 0:
            raise FileError("disk full on rank 7")
        return result

    run, write_file = Run(tmp_path), store.write_file
    monkeypatch.setattr(store, "write_file", lambda *of: written.append(0) or write_file(*of))
    with monkeypatch.context() as patch:
        patch.setattr(background.dist, "on_all_ranks", failing_elsewhere)
        begin(run)
        run.store.finish()
    assert len(written) == 1 and names(run) == ["step-00000001"]
    assert capsys.readouterr().out.count("failed: disk full on rank 7") == 2


def test_failures_of_one_stage_do_not_add_attempts_to_the_next(tmp_path, monkeypatch, capsys):
    run = Run(tmp_path)
    failing(monkeypatch, 4)
    failing_in_turn(monkeypatch, "publish", 100)
    begin(run)
    poll_until(run, lambda: "attempt 3 failed" in capsys.readouterr().out)
    pauses: list[float] = []
    monkeypatch.setattr(background.time, "sleep", pauses.append)
    with pytest.raises(FileError, match="given up after 6 attempts"):
        run.store.finish()
    assert pauses == [1, 2, 1, 2, 4, 8, 16]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_published_checkpoint_is_not_written_again_if_a_later_step_fails(tmp_path, monkeypatch, no_pauses, times):
    run, pointed = Run(tmp_path), store.write_atomically
    left = [times]

    def write_atomically(path, content):
        if path.name == "latest" and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        pointed(path, content)

    monkeypatch.setattr(store, "write_atomically", write_atomically)
    begin(run)
    run.store.finish()
    assert left == [0] and newest_valid(tmp_path).path == run.store.newest
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000001\n"


def test_an_unfinished_file_is_removed_to_free_its_space(tmp_path, monkeypatch):
    run = Run(tmp_path)
    failing(monkeypatch, 1)
    begin(run)
    poll_until(run, lambda: run.store._writing.failing)
    assert list((tmp_path / "checkpoints").rglob("*.safetensors")) == []


def test_a_disk_that_is_really_full(small_disk, capsys):
    disk = small_disk("1200k")
    run = Run(disk)
    run.train()
    first = run.save()  # 0.44 MB of it
    (disk / "others").write_bytes(bytes(500_000))
    begin(run)
    poll_until(run, lambda: "00001.safetensors: No space left on device" in capsys.readouterr().out)
    assert newest_valid(disk).path == first
    (disk / "others").unlink()
    poll_until(run, lambda: run.store.newest != first)
    assert verify(run.store.newest).manifest.step == 2


@pytest.mark.parametrize("spoil", [lambda path: os.truncate(path, 100), os.unlink])
def test_nothing_is_published_if_rank_0_does_not_see_a_file_as_it_was_written(tmp_path, monkeypatch, capsys, spoil):
    """As with another rank's file if the ranks do not share the folder."""
    run, exact = Run(tmp_path), store.write_file

    def cut(path, ranges):
        entry = exact(path, ranges)
        spoil(path)
        return entry

    monkeypatch.setattr(store, "write_file", cut)
    begin(run)
    poll_until(run, lambda: "as it was written: all ranks must share the folder" in capsys.readouterr().out)
    assert names(run) == []


def test_leftovers_of_an_interrupted_run_are_removed(tmp_path):
    run = Run(tmp_path)
    run.train()
    first = run.save()
    folder = tmp_path / "checkpoints"
    for name in (".step-00000002.tmp", ".step-00000000.old"):
        shutil.copytree(first, folder / name)
    (tmp_path / "elsewhere").mkdir()
    (folder / ".step-00000003.old").symlink_to(tmp_path / "elsewhere")  # a checkpoint that was on another disk
    (folder / ".step-00000004.tmp").touch()
    (folder / "latest").write_text("step-00000000\n")
    run.store.open(1)
    assert sorted(os.listdir(folder)) == ["latest", "step-00000001"] and (tmp_path / "elsewhere").is_dir()
    assert (folder / "latest").read_text() == "step-00000001\n"


def test_a_rollback_cancels_the_save_of_a_later_step(tmp_path, monkeypatch, capsys):
    run = Run(tmp_path)
    run.train()
    run.save()
    left = failing(monkeypatch, 100)
    begin(run)
    poll_until(run, lambda: "attempt 1 failed" in capsys.readouterr().out)
    run.store.newest_on_disk()
    run.store.roll_back(1)
    left[0] = 0
    for _ in range(20):
        run.store.poll()
    run.store.finish()
    assert names(run) == ["step-00000001"]
    run.step = 1
    run.train()
    run.save()
    assert names(run) == ["step-00000001", "step-00000002"]


def test_a_rollback_moves_the_pointer(tmp_path):
    run = Run(tmp_path)
    for _ in range(2):
        run.train()
        run.save()
    run.store.roll_back(1)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000001\n"
    run.store.roll_back(0)
    assert not (tmp_path / "checkpoints" / "latest").exists()
