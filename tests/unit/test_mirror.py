"""A copy of a run's checkpoints in an object store: atomic, with the run's retention, and used to resume."""

import errno
import os
import resource
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import boto3
import fsspec
import pytest

from tests.unit.mirrored import FILES, copied, objects, resumed_from, trained
from xar_scale.checkpoint import mirror
from xar_scale.checkpoint.manifest import Checkpoint, newest_valid, read_manifest
from xar_scale.checkpoint.mirror import Mirror, newest_valid_of
from xar_scale.errors import ConfigError, DataError, FileError
from xar_scale.startup import mirror_of


def spoil(store, url: str, key: str) -> None:
    name, _, prefix = url.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=store.url)
    place = {"Bucket": name, "Key": f"{prefix}/checkpoints/{key}"}
    content = bytearray(client.get_object(**place)["Body"].read())
    content[len(content) // 2] ^= 1
    client.put_object(**place, Body=bytes(content))


def test_a_run_that_has_lost_its_folder_resumes_from_the_copy(bucket, tmp_path):
    run = trained(tmp_path / "lost", bucket)
    shutil.move(tmp_path / "lost", tmp_path / "kept")
    checkpoint = resumed_from(tmp_path / "lost", bucket)
    assert checkpoint.path == run.store.newest
    for path in (tmp_path / "kept" / "checkpoints" / checkpoint.path.name).iterdir():
        assert path.read_bytes() == (checkpoint.path / path.name).read_bytes()
    assert newest_valid(tmp_path / "lost").path == checkpoint.path


def test_a_checkpoint_that_the_run_has_is_not_downloaded(store, bucket, tmp_path):
    run = trained(tmp_path, bucket)
    store.gets.clear()
    assert resumed_from(tmp_path, bucket).path == run.store.newest
    assert sum(store.gets.values()) == 0


def test_the_copy_replaces_a_damaged_checkpoint(bucket, tmp_path):
    run = trained(tmp_path, bucket)
    (run.store.newest / FILES[1]).write_bytes(b"")
    assert resumed_from(tmp_path, bucket).path == run.store.newest
    assert (tmp_path / "checkpoints" / f"damaged-{run.store.newest.name}").is_dir()


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_or_incomplete_copy_is_skipped_for_the_one_before(store, bucket, tmp_path, capsys, file):
    trained(tmp_path / "lost", bucket, keep_last=3)
    spoil(store, bucket, f"step-00000003/{file}")
    store.delete(bucket, f"checkpoints/step-00000002/{FILES[0]}")  # as if it had been interrupted
    found = resumed_from(tmp_path / "new", bucket)
    assert found.path.name == "step-00000001"
    assert file in capsys.readouterr().out
    spoil(store, bucket, f"step-00000001/{file}")
    with pytest.raises(DataError, match=file):
        resumed_from(tmp_path / "newer", bucket)


def test_an_unreachable_store_is_an_error_unless_the_run_has_a_checkpoint(bucket, tmp_path, capsys, monkeypatch):
    run = trained(tmp_path, bucket)

    def silent(*_arguments, **_options):
        raise TimeoutError

    monkeypatch.setattr(mirror, "RETRY_DELAYS_S", (0, 0))
    monkeypatch.setattr(fsspec.url_to_fs(bucket)[0], "ls", silent)
    assert resumed_from(tmp_path, bucket).path == run.store.newest
    said = capsys.readouterr().out
    assert f"{bucket}/checkpoints cannot be listed: TimeoutError: no message; continuing with" in said
    assert said.count("; retrying in 0 s") == 2
    with pytest.raises(FileError, match="cannot be listed"):
        resumed_from(tmp_path / "new", bucket)


@pytest.mark.parametrize("work", ["ls", "cat_file", "get_file"])
def test_a_failed_request_is_retried(bucket, tmp_path, monkeypatch, work):
    """A failure does not lead to an older checkpoint."""
    newest = trained(tmp_path / "lost", bucket).store.newest
    system, left = fsspec.url_to_fs(bucket)[0], [1]
    exact = getattr(system, work)

    def failing(*arguments, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise TimeoutError
        return exact(*arguments, **options)

    monkeypatch.setattr(system, work, failing)
    monkeypatch.setattr(mirror, "RETRY_DELAYS_S", (0,))
    assert resumed_from(tmp_path / "new", bucket).path.name == newest.name
    left[0] = 99
    with pytest.raises(FileError, match="TimeoutError"):
        resumed_from(tmp_path / "newer", bucket)


@pytest.mark.parametrize("url", ["store", "folder"])
def test_a_local_error_ends_the_run_instead_of_leading_to_an_older_checkpoint(bucket, tmp_path, capsys, largest_file, url):
    url = bucket if url == "store" else f"file://{tmp_path}/copy"
    trained(tmp_path / "one", url)
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "step-00000003")
    largest_file(1000)  # as on a full disk
    with pytest.raises(FileError, match=f"^{tmp_path}/one/checkpoints/.step-00000003.tmp/{FILES[0]}: File too large$"):
        resumed_from(tmp_path / "one", url)
    largest_file(resource.RLIM_INFINITY)
    said = capsys.readouterr().out
    assert "retrying" not in said and "continuing with" not in said
    assert resumed_from(tmp_path / "one", url).path.name == "step-00000003"


def test_a_download_folder_that_cannot_be_made_ends_the_run(bucket, tmp_path, monkeypatch):
    trained(tmp_path, bucket)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")

    def refuse(path, **_options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FileError, match=f"^{tmp_path}/checkpoints/.step-00000003.tmp: Permission denied$"):
        resumed_from(tmp_path, bucket)


def test_a_node_without_the_run_folder_ends_the_run(bucket, tmp_path, monkeypatch):
    trained(tmp_path, bucket, 1)
    monkeypatch.setattr(mirror, "FOLDER_WAIT_S", 1)
    with pytest.raises(FileError, match=f"^{tmp_path}/nowhere does not exist on this node$"):
        Mirror(bucket).download(1, FILES, tmp_path / "nowhere")


def test_a_node_that_does_not_see_the_run_folder_at_once_waits(bucket, tmp_path):
    trained(tmp_path, bucket, 1)
    threading.Timer(1.5, (tmp_path / "late").mkdir).start()
    Mirror(bucket).download(1, FILES, tmp_path / "late")
    assert sorted(path.name for path in (tmp_path / "late").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("name", ["up[2]", "what?", "a*"])
def test_copies_at_a_path_that_looks_like_a_pattern_are_found(tmp_path, name):
    url = f"file://{tmp_path}/{name}/run"
    newest = trained(tmp_path / "lost", url, 2, keep_last=1).store.newest
    assert Mirror(url).steps() == [2]
    assert resumed_from(tmp_path / "new", url).path.name == newest.name


def test_the_run_s_own_folder_is_refused_as_the_copy(tmp_path):
    run = tmp_path / "run"
    (tmp_path / "link").symlink_to(run)
    run.mkdir()
    for own in (f"file://{run}", f"file://{tmp_path}/link/", f"file://{tmp_path}/x/../run"):
        with pytest.raises(ConfigError, match="is the run's own folder"):
            mirror_of(run, own)
    assert mirror_of(run, f"file://{run}/copy").url == f"file://{run}/copy"


def test_changes_by_another_process_are_seen(store, bucket, tmp_path):
    """Listings are not cached."""
    mirror = Mirror(bucket)
    trained(tmp_path, bucket, 1)
    assert mirror.steps() == [1]
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=store.url)
    for key in copied([2]):
        client.put_object(Bucket=name, Key=f"{prefix}/checkpoints/{key}", Body=b"theirs")
    assert mirror.steps() == [1, 2]
    store.delete(bucket, f"checkpoints/step-00000001/{FILES[0]}")
    assert mirror.steps() == [2]


def test_leftovers_of_an_interrupted_download_do_no_harm(bucket, tmp_path):
    run = trained(tmp_path / "lost", bucket, 1)
    left = tmp_path / "new" / "checkpoints" / ".step-00000001.tmp"
    left.mkdir(parents=True)
    (left / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"of more ranks")
    found = resumed_from(tmp_path / "new", bucket)
    assert found.path.name == run.store.newest.name and sorted(path.name for path in found.path.iterdir()) == FILES


def test_a_stale_listing_loses_nothing(store, bucket, tmp_path, monkeypatch):
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=store.url)
    client.put_object(Bucket=name, Key=f"{prefix}/checkpoints/step-00000001-best/notes.txt", Body=b"mine")
    exact = Mirror.steps

    def late(self, **files):  # a listing without the newest manifest
        return exact(self, **files) if files else exact(self)[:-1]

    monkeypatch.setattr(Mirror, "steps", late)
    trained(tmp_path, bucket, 2, keep_last=2)
    assert objects(store, bucket) == sorted(["step-00000001-best/notes.txt", *copied([1, 2])])


def test_only_urls_that_fsspec_opens_are_accepted(tmp_path):
    run = trained(tmp_path / "run", f"file://{tmp_path}/copy", 1)
    assert newest_valid(tmp_path / "copy").manifest == newest_valid(tmp_path / "run").manifest
    assert run.store.newest.name == "step-00000001"
    with pytest.raises(ConfigError, match=r"train.upload nosuch://x/y cannot be opened: .*nosuch"):
        Mirror("nosuch://x/y")
    for path in ("s3:/bucket/x", "backup/x", str(tmp_path), "s3://", "file:///", "://x"):
        with pytest.raises(ConfigError, match=f"train.upload {path} is not a URL such as s3://bucket/runs/h"):
            Mirror(path)


def test_check_writable_leaves_nothing_behind(store, bucket, tmp_path, monkeypatch):
    Mirror(bucket).check_writable()
    Mirror(f"file://{tmp_path}/copy").check_writable()
    assert objects(store, bucket) == [] and not [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    (tmp_path / "file").touch()
    missing = f"{bucket.rsplit('/', 2)[0]}-that-is-not-there/run"
    for url, said in ((f"file://{tmp_path}/file/x", "NotADirectory"), ("file:///proc/nope", "FileNotFound"), (missing, "File")):
        with pytest.raises(FileError, match=f"{url}/checkpoints cannot be written: {said}"):
            Mirror(url).check_writable()

    def forbidden(*_arguments, **_options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.url_to_fs(bucket)[0], "pipe_file", forbidden)
    with pytest.raises(FileError, match=f"{bucket}/checkpoints cannot be written: PermissionError: Access Denied"):
        Mirror(bucket).check_writable()


def test_a_checkpoint_that_the_run_cannot_resume_from_is_not_downloaded(bucket, tmp_path, capsys):
    trained(tmp_path / "other", bucket)

    def refuse(found: Checkpoint) -> None:
        raise ConfigError(f"{found.path} has taken {found.manifest.step}")

    with pytest.raises(ConfigError, match=f"train.upload {bucket}: step-00000003 has taken 3"):
        newest_valid_of(tmp_path / "new", Mirror(bucket), refuse)
    assert not (tmp_path / "new").exists() and "downloading" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../../escaped.safetensors", "/escaped.safetensors", "latest"])
def test_a_copy_whose_manifest_names_files_elsewhere_is_refused(tmp_path, name):
    """Otherwise whoever can write to the mirror could overwrite any file of the user."""
    url = f"file://{tmp_path}/copy"
    path = trained(tmp_path / "run", url, 1).store.newest
    manifest = read_manifest(path).manifest
    name = f"{tmp_path}{name}" if name.startswith("/") else name
    copy = tmp_path / "copy" / "checkpoints" / path.name
    (entry,) = manifest.files.values()
    (copy / "manifest.json").write_bytes(replace(manifest, files={name: entry}).to_json())
    (tmp_path / "escaped.safetensors").write_text("mine")
    with pytest.raises(DataError, match=f"names '{name}', which is not a checkpoint file"):
        resumed_from(tmp_path / "new" / "run", url)
    assert (tmp_path / "escaped.safetensors").read_text() == "mine"
