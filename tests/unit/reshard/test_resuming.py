"""A conversion that was killed, or two at once: what is written is as if undisturbed."""

import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace

import pytest

from tests.processes import ROOT, environment
from tests.unit.foreign_checkpoints import TARGETS, assert_bitwise, contents, reshard, values
from xar_scale.checkpoint.interop import open_source
from xar_scale.checkpoint.interop import source as sources
from xar_scale.checkpoint.manifest import read_manifest, verify
from xar_scale.checkpoint.reshard import parts, plan, writer

KILLED = """
    import os, signal, sys
    from tools import reshard
    from xar_scale.checkpoint.reshard import writer
    writer.SYNC, writer.BLOCK = {sync}, {block}
    count, write_block = 0, writer._write
    def killed(file, offset, view):
        global count
        count += 1
        if count == {after}:
            write_block(file, offset, view[:len(view) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write_block(file, offset, view)
    writer._write = killed
    sys.exit(reshard.main())
"""


@pytest.mark.parametrize(("target", "after"), [("pth", 150), ("universal", 150)])
def test_after_a_kill_it_resumes_and_the_result_is_the_same(tmp_path, own, zero, target, after, monkeypatch):
    source, block = (zero, 64) if target == "universal" else (own, 4096)
    program = textwrap.dedent(KILLED.format(sync=12 * block, block=block, after=after))
    words = [source, tmp_path / "new", "--to", target]
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=ROOT, env=environment(), timeout=400)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".new.partial"]

    read, asked = sources.Source.read, 0

    def counted(self, key, start, out):
        nonlocal asked
        asked += out.numel()
        read(self, key, start, out)

    monkeypatch.setattr(sources.Source, "read", counted)
    monkeypatch.setattr(writer, "verify_source", lambda *_: pytest.fail("what was verified is verified again"))
    monkeypatch.setattr(writer, "BLOCK", block)
    assert reshard(*words) == 0
    monkeypatch.setattr(writer, "verify_source", lambda *_: None)
    went_on, asked = asked, 0
    assert reshard(source, tmp_path / "undisturbed", "--to", target) == 0
    assert 0 < went_on < 0.8 * asked
    assert contents(tmp_path / "new") == contents(tmp_path / "undisturbed")
    assert all(zipfile.ZipFile(path).testzip() is None for path in (tmp_path / "new").rglob("*.p*t*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "undisturbed"]


def test_another_source_or_target_starts_over(tmp_path, own, state):
    program = textwrap.dedent(KILLED.format(sync=40960, block=4096, after=60))
    words = [sys.executable, "-c", program, str(own), str(tmp_path / "new"), "--to", "xar-scale"]
    assert subprocess.run(words, cwd=ROOT, env=environment(), timeout=400).returncode == -signal.SIGKILL
    assert reshard(own, tmp_path / "new", "--to", "xar-scale", "--files", "2") == 0
    assert len(verify(tmp_path / "new").manifest.files) == 2
    assert_bitwise(values(tmp_path / "new"), state)


def test_a_changed_manifest_starts_over(tmp_path, own, capsys):
    """Its checksums are verified although its shards are the same."""
    source = shutil.copytree(own, tmp_path / "own")
    program = textwrap.dedent(KILLED.format(sync=40960, block=4096, after=60))
    words = [sys.executable, "-c", program, str(source), str(tmp_path / "new"), "--to", "pth"]
    assert subprocess.run(words, cwd=ROOT, env=environment(), timeout=400).returncode == -signal.SIGKILL
    manifest = read_manifest(source).manifest
    files = {name: replace(entry, sha256="0" * 64) for name, entry in manifest.files.items()}
    (source / "manifest.json").write_bytes(replace(manifest, files=files).to_json())
    assert reshard(source, tmp_path / "new", "--to", "pth") == 65
    assert "is corrupt (its SHA-256 differs)" in capsys.readouterr().err


def test_what_the_last_file_says_is_part_of_the_digest(own):
    with open_source(own) as source:
        before = writer._digest(source, plan(source, "xar-scale"))
        source.manifest = replace(source.manifest, step=source.manifest.step + 1)
        assert writer._digest(source, plan(source, "xar-scale")) != before


def test_an_interrupted_conversion_does_not_depend_on_names_in_the_code(own, monkeypatch):
    with open_source(own) as source:
        before = [writer._digest(source, plan(source, target)) for target in TARGETS]
        for part in (parts.Slice, parts.Fixed, parts.Deferred):
            monkeypatch.setattr(part, "__repr__", lambda self: f"Renamed({tuple(self)})")
        assert [writer._digest(source, plan(source, target)) for target in TARGETS] == before


def test_a_record_after_a_torn_line_of_the_journal_is_read_at_the_next_start(tmp_path):
    with writer._Work(tmp_path / "new", "digest"):
        pass
    with (tmp_path / ".new.partial" / "journal").open("a") as journal:
        journal.write('{"file": "a", "by')
    with writer._Work(tmp_path / "new", "digest") as work:
        work.record({"verified": True})
    with writer._Work(tmp_path / "new", "digest") as work:
        assert work.verified


def test_two_processes_do_not_write_the_same_destination(tmp_path, own, capsys):
    with open_source(own) as source:
        digest = writer._digest(source, plan(source, "pth"))
    with writer._Work(tmp_path / "new", digest):
        assert reshard(own, tmp_path / "new", "--to", "pth") == 64
    assert "another process is writing" in capsys.readouterr().err
