"""Files in folders that other users may reach."""

import os

import pytest

from xar_scale.files import locked, own_temporary_folder, write_atomically


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty folder in place of the system's for temporary files."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_the_temporary_folder_is_for_its_owner_alone(temporary):
    folder = own_temporary_folder()
    assert folder == own_temporary_folder() == temporary / f"xar_scale-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("prepared", ["writable", "another's", "a link"])
def test_a_temporary_folder_that_somebody_prepared_is_refused(prepared, temporary, monkeypatch):
    folder = temporary / f"xar_scale-{os.getuid()}"
    if prepared == "a link":
        (temporary / "real").mkdir()
        folder.symlink_to(temporary / "real")
    else:
        folder.mkdir()
        folder.chmod(0o777 if prepared == "writable" else 0o755)
    if prepared != "writable":
        found = os.lstat(folder)
        monkeypatch.setattr("pathlib.Path.lstat", lambda _: os.stat_result([*found[:4], found.st_uid + 1, *found[5:10]]))
    with pytest.raises(PermissionError, match="it is another user's, or others may write to it") as refused:
        own_temporary_folder()
    assert refused.value.filename == str(folder)


def test_files_are_not_written_through_planted_links(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for planted in ("config.yaml.tmp", "lock"):
        (tmp_path / planted).symlink_to(precious)
    with pytest.raises(OSError, match="config.yaml"):
        write_atomically(tmp_path / "config.yaml", b"new")
    with pytest.raises(OSError, match="lock"), locked(tmp_path / "lock"):
        pass
    assert precious.read_text() == "kept"
    write_atomically(tmp_path / "config.yaml", b"new")  # the failed attempt has removed the link
    assert (tmp_path / "config.yaml").read_text() == "new"
