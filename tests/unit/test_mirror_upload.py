"""Checkpoints that a run copies to a URL: while it trains, when it goes back, and at its end."""

import dataclasses
import errno
import os
import shutil
import threading

import boto3
import fsspec
import pytest

from tests.unit.mirrored import FILES, copied, objects, resumed_from, trained
from tests.unit.tiny_run import Run, poll_until
from xar_scale import background
from xar_scale.checkpoint import store as store_module
from xar_scale.checkpoint.files import file_name, fingerprint
from xar_scale.checkpoint.manifest import MANIFEST, checkpoint_paths, newest_valid, read_manifest, step_of
from xar_scale.checkpoint.mirror import Mirror
from xar_scale.errors import FileError


@pytest.fixture
def gate(monkeypatch):
    """An event: copies are made while it is set."""
    gate, exact = threading.Event(), Mirror.upload

    def gated(*arguments):
        assert gate.wait(20)
        exact(*arguments)

    monkeypatch.setattr(Mirror, "upload", gated)
    return gate


def test_checkpoints_are_copied_with_the_retention_of_the_run(store, bucket, tmp_path, capsys):
    run = trained(tmp_path, bucket, 5, keep_last=2, keep_every=2)
    assert objects(store, bucket) == copied([2, 4, 5])
    assert [path.name for path in checkpoint_paths(tmp_path)] == [f"step-{step:08d}" for step in (2, 4, 5)]
    assert Mirror(bucket).steps() == [2, 4, 5]
    assert f"copy of checkpoint {run.store.newest} to {bucket}: done" in capsys.readouterr().out


def test_copies_of_later_steps_stay_unless_the_run_has_rolled_back(store, bucket, tmp_path):
    """The store was unreachable when the run restarted: these copies belong to the same trajectory."""
    trained(tmp_path / "lost", bucket, 4, keep_last=9)
    again = trained(tmp_path / "again", bucket, 3, keep_last=9)
    again.store.roll_back(1)
    again.step = 1
    again.train()
    again.save()
    assert objects(store, bucket) == copied([1, 2, 4])


def test_a_checkpoint_is_not_removed_if_the_listing_fails(bucket, tmp_path, monkeypatch):
    """The listing did not show that its manifest is missing."""
    run = trained(tmp_path, bucket, 1, keep_last=9)
    system = fsspec.url_to_fs(bucket)[0]
    exact = system.ls

    def failing(path, **options):
        if path.endswith("step-00000001"):
            raise TimeoutError
        return exact(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(system, "ls", failing)
        run.train()
        run.store.save(run.manifest())
        poll_until(run, lambda: run.store.newest and run.store.newest.name.endswith("2"))
        poll_until(run, lambda: run.store._uploading is not None and run.store._uploading.attempts)
    run.store.finish()
    assert Mirror(bucket).steps() == [1, 2]


def test_a_failed_copy_is_retried_while_training_continues(store, bucket, tmp_path, capsys, monkeypatch):
    system, left = fsspec.url_to_fs(bucket)[0], [2]
    exact = system.put_file

    def put_file(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("cut")
        return exact(*arguments)

    monkeypatch.setattr(system, "put_file", put_file)
    run = Run(tmp_path, mirror=Mirror(bucket))
    run.train()
    run.store.save(run.manifest())
    poll_until(run, lambda: run.store._uploading is not None and run.store._uploading.done)
    assert capsys.readouterr().out.count("cannot be written: ConnectionError: cut") == 2
    assert objects(store, bucket) == copied([1])


def test_leftovers_of_an_abandoned_upload_are_removed_by_the_next(store, bucket, tmp_path, monkeypatch):
    system = fsspec.url_to_fs(bucket)[0]
    exact = system.put_file

    def put_file(path, *arguments):
        if "step-00000002/manifest" in str(path):
            raise ConnectionError("cut")
        return exact(path, *arguments)

    monkeypatch.setattr(system, "put_file", put_file)
    run = Run(tmp_path, mirror=Mirror(bucket), keep_last=3)
    for step in (1, 2, 3):
        run.train()
        run.store.save(run.manifest())
        poll_until(run, lambda: run.store._writing is None and (run.store._uploading.done or run.store._uploading.failing))
        begun = [f"step-00000002/{FILES[1]}"] if step == 2 else []
        assert objects(store, bucket) == copied([1]) + begun + copied([3] if step == 3 else [])
    run.store.finish()
    assert objects(store, bucket) == copied([1, 3])


def test_an_interrupted_removal_leaves_no_complete_copy(store, bucket, tmp_path, monkeypatch):
    trained(tmp_path, bucket, 2)
    system = fsspec.url_to_fs(bucket)[0]

    def cut(*_arguments, **_options):
        raise ConnectionError("cut")

    monkeypatch.setattr(system, "rm", cut)
    with pytest.raises(FileError, match="step-00000002 cannot be removed: ConnectionError: cut"):
        Mirror(bucket).remove(2)
    assert objects(store, bucket) == [*copied([1]), f"step-00000002/{FILES[1]}"] and Mirror(bucket).steps() == [1]


def test_the_end_of_a_run_waits_for_the_copy_and_reports_its_failure(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(background.time, "sleep", lambda seconds: None)
    run = Run(tmp_path, mirror=Mirror(f"{bucket.rsplit('/', 2)[0]}-that-is-not-there/run"))
    run.train()
    run.store.save(run.manifest())
    with pytest.raises(FileError, match=r"copy of .*: given up after 6 attempts: s3://.*-not-there/run/.* cannot be written"):
        run.store.finish()
    assert newest_valid(tmp_path).manifest.step == 1


def test_a_stopped_run_needs_its_checkpoint_but_not_the_copy(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(background.time, "sleep", lambda seconds: None)
    run = Run(tmp_path, mirror=Mirror(f"{bucket.rsplit('/', 2)[0]}-that-is-not-there/run"))
    run.train()
    run.store.save(run.manifest())
    run.store.finish(stopped=True)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"copy of checkpoint {run.store.newest} ") and "given up after 6 attempts" in said

    def full(path, _parts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("xar_scale.checkpoint.store.write_file", full)
    run.train()
    run.store.save(run.manifest())
    with pytest.raises(FileError, match=r"^checkpoint .*step-00000002: given up after 6 attempts"):
        run.store.finish(stopped=True)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_stopped_run_gives_its_copies_a_limited_time(tmp_path, monkeypatch, capsys, steps):
    """SLURM kills it five minutes after the signal, and requeues it only if it has exited before. ``steps``: 2, and the last
    copy waits for the one under way."""
    url, held = f"file://{tmp_path}/copy", threading.Event()
    monkeypatch.setattr(store_module, "STOP_UPLOAD_S", 0.5)
    run = Run(tmp_path, mirror=Mirror(url))
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "upload", lambda *_: held.wait())
        for step in range(1, steps + 1):
            run.train()
            run.store.save(run.manifest())
            poll_until(run, lambda step=step: run.store.newest and step_of(run.store.newest) == step and run.store._uploading)
        run.store.finish(stopped=True)
        said = f"copy of checkpoint {checkpoint_paths(tmp_path)[0]} to {url}: given up: the run exits"
        assert capsys.readouterr().out.splitlines()[-1] == said
    held.set()
    resumed = Run(tmp_path, mirror=Mirror(url))
    resumed.store.inherit(run.store.newest)
    resumed.store.finish()
    assert Mirror(url).steps() == [steps]


@pytest.mark.parametrize("there", ["it", "another", "torn", "none"])
def test_the_checkpoint_that_a_run_resumes_from_is_copied_if_it_was_not(tmp_path, monkeypatch, there):
    """Of any number of ranks: this one had three. ``there``: what is in place of the copy; another is from before a
    rollback."""
    url, copied_names = f"file://{tmp_path}/copy", []
    checkpoint = trained(tmp_path, url, 1).store.newest
    for name in (file_name(1), file_name(2)):
        (checkpoint / name).write_bytes(b"c")
    manifest = read_manifest(checkpoint).manifest
    files = manifest.files | {name: fingerprint(checkpoint / name) for name in (file_name(1), file_name(2))}
    (checkpoint / MANIFEST).write_bytes(dataclasses.replace(manifest, files=files).to_json())
    copy = tmp_path / "copy" / "checkpoints" / checkpoint.name
    if there == "it":
        shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
    elif there == "torn":
        (copy / MANIFEST).write_text("{")
    elif there == "none":
        Mirror(url).remove(1)
    upload = Mirror.upload

    def counted(mirror, folder, names):
        copied_names.extend(names := list(names))
        upload(mirror, folder, names)

    monkeypatch.setattr(Mirror, "upload", counted)
    run = Run(tmp_path, mirror=Mirror(url))
    run.store.inherit(checkpoint)
    poll_until(run, lambda: run.store._uploading is not None and run.store._uploading.done)
    assert copied_names == ([] if there == "it" else [*sorted(files), MANIFEST]) and Mirror(url).steps() == [1]
    shutil.rmtree(checkpoint)
    run.train()  # after a rollback: what the run writes of that step now replaces the copy
    run.store.save(run.manifest())
    run.store.finish()
    assert copied_names[-2:] == FILES[::-1]


def test_a_checkpoint_of_another_run_is_not_copied(tmp_path):
    other = Run(tmp_path / "other")
    other.train()
    run = Run(tmp_path / "run", mirror=Mirror(f"file://{tmp_path}/copy"))
    run.store.inherit(other.save())
    run.store.finish()
    assert Mirror(f"file://{tmp_path}/copy").steps() == []


def test_a_checkpoint_under_copy_is_not_dropped_and_the_newest_is_copied_next(store, bucket, tmp_path, gate):
    run = Run(tmp_path, mirror=Mirror(bucket), keep_last=1)
    for step in range(1, 5):
        run.train()
        run.store.save(run.manifest())
        poll_until(run, lambda step=step: run.store.newest and run.store.newest.name.endswith(str(step)))
    assert [path.name for path in checkpoint_paths(tmp_path)] == [f"step-{step:08d}" for step in (1, 3, 4)]
    gate.set()
    run.store.finish()
    assert objects(store, bucket) == copied([4])  # 2 and 3 were never copied, 1 was dropped as too old


def test_a_rollback_cancels_the_copy_of_a_later_step(store, bucket, tmp_path, gate):
    run = Run(tmp_path, mirror=Mirror(bucket))
    for step in (1, 2):
        run.train()
        run.store.save(run.manifest())
        poll_until(run, lambda step=step: run.store.newest and run.store.newest.name.endswith(str(step)))
    run.store.roll_back(1)
    gate.set()
    run.store.finish()
    assert objects(store, bucket) == copied([1])


def test_a_step_that_is_repeated_replaces_its_copy(store, bucket, tmp_path):
    run = trained(tmp_path, bucket, 2)
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    of_more_ranks = f"{prefix}/checkpoints/step-00000002/shard-00002-model-00001-of-00001.safetensors"
    boto3.client("s3", endpoint_url=store.url).put_object(Bucket=name, Key=of_more_ranks, Body=b"old")
    run.store.set_aside_after(1)
    run.train()
    run.step = 2
    run.save()
    assert objects(store, bucket) == copied([1, 2])
    fetched = resumed_from(tmp_path / "new", bucket)
    assert fetched.manifest.files == newest_valid(tmp_path).manifest.files


def test_after_a_rollback_new_copies_are_kept_and_those_of_undone_steps_removed(store, bucket, tmp_path):
    run = trained(tmp_path, bucket, 4, keep_last=2)
    assert Mirror(bucket).steps() == [3, 4]
    run.store.roll_back(1)
    run.step = 2
    run.save()
    assert objects(store, bucket) == copied([2])


def test_at_the_end_the_newest_is_copied_even_if_one_before_it_failed(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(background.time, "sleep", lambda seconds: None)
    exact, refused = Mirror.upload, "step-00000001"

    def upload(self, folder, names):
        if folder.name == refused:
            raise FileError("refused")
        exact(self, folder, names)

    monkeypatch.setattr(Mirror, "upload", upload)
    run = Run(tmp_path, mirror=Mirror(bucket))
    run.train()
    run.store.save(run.manifest())
    poll_until(run, lambda: run.store._uploading is not None and run.store._uploading.attempts > 2)
    run.train()
    run.save()
    assert Mirror(bucket).steps() == [2]


def test_at_the_end_a_failed_copy_is_not_retried_if_a_newer_one_waits(bucket, tmp_path, monkeypatch, gate):
    gated, pauses, failures = Mirror.upload, [], [FileError("refused")]

    def upload(*arguments):
        gated(*arguments)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(Mirror, "upload", upload)
    run = Run(tmp_path, mirror=Mirror(bucket))
    for step in (1, 2):
        run.train()
        run.store.save(run.manifest())
        poll_until(run, lambda step=step: run.store.newest and run.store.newest.name.endswith(str(step)))
    monkeypatch.setattr(background.time, "sleep", pauses.append)
    gate.set()
    run.store.finish()
    assert pauses == [] and Mirror(bucket).steps() == [2]


def test_the_end_gives_a_copy_six_attempts_however_often_it_failed_before(bucket, tmp_path, monkeypatch):
    pauses: list[float] = []
    run, refused = Run(tmp_path, mirror=Mirror(bucket)), [True]
    exact = Mirror.upload

    def upload(self, folder, names):
        if refused[0]:
            raise FileError("refused")
        exact(self, folder, names)

    monkeypatch.setattr(Mirror, "upload", upload)
    run.train()
    run.store.save(run.manifest())
    poll_until(run, lambda: run.store._uploading is not None and run.store._uploading.attempts > 6)

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        refused[0] = len(pauses) < 3

    monkeypatch.setattr(background.time, "sleep", pause)
    run.store.finish()
    assert pauses == [1, 2, 4] and Mirror(bucket).steps() == [1]
