"""tools/reshard.py: bitwise equal output, one line for what cannot be, atomic."""

import errno
import json
import re
import resource
import shutil
import subprocess
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.unit.damage import flip_byte
from tests.unit.foreign_checkpoints import (
    TARGETS,
    assert_bitwise,
    contents,
    named_ours,
    published,
    random_state,
    reshard,
    values,
    write_zero3,
)
from tests.unit.tiny_run import CONFIG, Run
from xar_scale.checkpoint.interop import open_source
from xar_scale.checkpoint.load import load
from xar_scale.checkpoint.manifest import read_manifest, verify
from xar_scale.checkpoint.reshard import writer


def only(state, kind: str) -> dict[str, torch.Tensor]:
    return {key.partition("/")[2]: tensor for key, tensor in state.items() if key.startswith(f"{kind}/")}


def check_sums(folder: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    listed = {line.split(": ")[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and listed == set(contents(folder)) - {"SHA256SUMS"}


@pytest.mark.parametrize("target", ["universal", "xar-scale"])
def test_round_trip(tmp_path, own, state, target):
    assert reshard(own, tmp_path / "there", "--to", target) == 0
    assert reshard(tmp_path / "there", tmp_path / "back", "--to", "xar-scale", "--files", 1) == 0
    assert_bitwise(values(tmp_path / "back"), state)
    again = tmp_path / "again"
    assert reshard(tmp_path / "back", again, "--to", target) == 0
    if target == "universal":  # the groups' settings come from a config, which the way back loses
        assert_bitwise(values(again), values(tmp_path / "there"))
    else:
        assert contents(again) == contents(tmp_path / "there")


@pytest.mark.parametrize("target", ["safetensors", "pth"])
def test_round_trip_of_weights(tmp_path, own, state, target):
    assert reshard(own, tmp_path / "there", "--to", target) == 0
    assert reshard(tmp_path / "there", tmp_path / "back", "--to", "xar-scale") == 0
    assert reshard(tmp_path / "back", tmp_path / "again", "--to", target) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "there")
    expected = {f"{kind}/{name}": t for kind in ("model", "ema") for name, t in only(state, kind).items()}
    if target == "safetensors":
        expected = {f"model/{name}": tensor for name, tensor in only(state, "ema").items()}
    assert_bitwise(values(tmp_path / "back"), expected)


def test_a_resharded_checkpoint_resumes_and_its_manifest_differs_only_in_files(tmp_path, run, own):
    assert reshard(own, tmp_path / "cut", "--to", "xar-scale", "--files", 3) == 0
    cut, before = verify(tmp_path / "cut"), read_manifest(own).manifest
    assert {**vars(cut.manifest), "files": None} == {**vars(before), "files": None}
    assert len(cut.manifest.files) == 3
    sizes = [entry.bytes for entry in cut.manifest.files.values()]
    assert max(sizes) < 1.05 * min(sizes)
    other = Run(tmp_path / "other", seed=1)
    load(cut, other.engine, other.ema)
    assert all(torch.equal(a, b) for a, b in zip(run.state(), other.state(), strict=True))


def test_torch_safetensors_zip_and_sha256sum_read_what_is_written(tmp_path, own, state):
    for target in ("pth", "safetensors", "universal"):
        assert reshard(own, tmp_path / target, "--to", target) == 0
        check_sums(tmp_path / target)
    saved = torch.load(tmp_path / "pth" / "model.pth", weights_only=True)
    for kind, key in (("model", "model"), ("ema", "model_ema")):
        assert_bitwise(named_ours(saved[key]), only(state, kind))
    index = json.loads((tmp_path / "safetensors" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in only(state, "ema").values())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "safetensors" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found[name] = opened.get_tensor(name)
    assert_bitwise(found, only(state, "ema"))
    zero = tmp_path / "universal" / "global_step2" / "zero"
    loaded = torch.load(zero / "out_proj.weight" / "exp_avg.pt", weights_only=True)["param"]
    assert torch.equal(loaded, state["exp_avg/out_proj.weight"])
    archives = [tmp_path / "pth" / "model.pth", *tmp_path.glob("universal/*/*/*/*.pt")]
    assert len(archives) > 5
    for path in archives:
        archive, content = zipfile.ZipFile(path), path.read_bytes()
        assert archive.testzip() is None
        for entry in archive.infolist():  # each has its checksum again after its content
            end = content.index(b"PK\x07\x08", entry.header_offset + entry.file_size)
            assert int.from_bytes(content[end + 4 : end + 8], "little") == entry.CRC, entry


def test_one_set_of_weights_if_requested(tmp_path, own, state):
    assert reshard(own, tmp_path / "pth", "--to", "pth", "--weights", "ema") == 0
    assert_bitwise(named_ours(torch.load(tmp_path / "pth" / "model.pth", weights_only=True)), only(state, "ema"))
    assert reshard(own, tmp_path / "safetensors", "--to", "safetensors", "--weights", "model") == 0
    assert_bitwise(only(values(tmp_path / "safetensors"), "model"), only(state, "model"))


def test_large_safetensors_are_split_between_tensors(tmp_path, own, state, monkeypatch):
    monkeypatch.setattr("xar_scale.checkpoint.reshard.targets.SAFETENSORS_BYTES", 10_000)
    assert reshard(own, tmp_path / "cut", "--to", "safetensors", "--weights", "model") == 0
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    assert_bitwise(only(values(tmp_path / "cut"), "model"), only(state, "model"))


def test_published_weights_become_an_xar_scale_checkpoint(tmp_path, state):
    torch.save(published(only(state, "model"), CONFIG.model), tmp_path / "xAR.pth")
    assert reshard(tmp_path / "xAR.pth", tmp_path / "own", "--to", "xar-scale") == 0
    manifest = verify(tmp_path / "own").manifest
    assert (manifest.kinds, manifest.step, manifest.config, manifest.dataset) == (("model",), 0, {}, {})
    assert_bitwise(only(values(tmp_path / "own"), "model"), only(state, "model"))


def test_the_number_of_skipped_steps_is_kept(tmp_path, zero):
    assert reshard(zero, tmp_path / "own", "--to", "xar-scale") == 0
    manifest = read_manifest(tmp_path / "own").manifest
    assert (manifest.step, manifest.guard.skipped) == (5, 1)
    assert reshard(tmp_path / "own", tmp_path / "universal", "--to", "universal") == 0
    with open_source(tmp_path / "universal") as source:
        assert (source.step, source.updates) == (5, 4)
    assert_bitwise(values(tmp_path / "universal"), random_state("model", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, own, target, capsys):
    before = contents(own)
    assert reshard(own, tmp_path / "new", "--to", target, "--dry-run") == 0
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and contents(own) == before
    assert reshard(own, tmp_path / "new", "--to", target) == 0
    written = contents(tmp_path / "new")
    last = written.pop("manifest.json" if target == "xar-scale" else "SHA256SUMS")
    size = sum(map(len, written.values()))
    assert last and f"would write {tmp_path / 'new'} as {target}: {len(written) + 1} files, {size:,} bytes" in out
    for line in out.splitlines()[2:18]:
        if not line.endswith("more"):
            size, name = line.split()
            assert len(written[name]) == int(size.replace(",", ""))


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--to", "pth", "--files", "2"], 64, "--files applies to xar-scale, not to pth"),
        (["--to", "xar-scale", "--files", "0"], 64, "--files is 0, must be at least 1"),
        (["--to", "universal", "--weights", "ema"], 64, "--weights applies to safetensors and pth, not to universal"),
        (["--to", "safetensors", "--weights", "ema"], 64, "zero holds model, exp_avg, exp_avg_sq; --to safetensors needs ema"),
        (["--to", "pth"], 65, "weights under our names lack 16 entries, first class_embed.weight"),
        (["--to", "nothing"], 64, "invalid choice: 'nothing'"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(tmp_path, zero, capsys, words, code, line):
    assert reshard(zero, tmp_path / "new", *words) == code
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_do_not_make_a_universal_checkpoint(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    assert reshard(tmp_path / "a.pth", tmp_path / "new", "--to", "universal") == 64
    assert "a.pth holds model; --to universal needs exp_avg" in capsys.readouterr().err


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, capsys):
    write_zero3(tmp_path / "zero", random_state("model", "exp_avg", "exp_avg_sq"))
    for path in (tmp_path / "zero").glob("*model_states*"):
        content = torch.load(path)
        content["param_shapes"][0] = {"../../out": torch.Size([5, 7])}
        torch.save(content, path)
    assert reshard(tmp_path / "zero", tmp_path / "new", "--to", "universal") == 65
    assert "parameter '../../out' is not a valid folder name" in capsys.readouterr().err


def test_pickles_are_trusted_only_when_told_to(tmp_path, capsys):
    torch.save({"a": torch.ones(2), "options": types.SimpleNamespace()}, tmp_path / "a.pth")
    words = [tmp_path / "a.pth", tmp_path / "new", "--to", "safetensors"]
    assert reshard(*words) == 65
    assert "a.pth needs types.SimpleNamespace, which unpickling would run" in capsys.readouterr().err
    assert reshard(*words, "--trust-pickle") == 0
    assert torch.equal(values(tmp_path / "new")["model/a"], torch.ones(2))


def test_nothing_is_overwritten(tmp_path, own, capsys):
    (tmp_path / "new").mkdir()
    assert reshard(own, tmp_path / "new", "--to", "pth") == 64
    assert "new exists already; nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["xar-scale", "universal", "safetensors", "pth"])
def test_a_source_that_has_changed_since_its_checksums_is_refused(tmp_path, own, target, capsys):
    assert reshard(own, tmp_path / "source", "--to", target) == 0
    places = {"xar-scale": "shard-00003-*", "universal": "*/zero/mid_proj.weight/fp32.pt"}
    (path,) = (tmp_path / "source").glob(places.get(target, f"*.{target}"))
    flip_byte(path)
    assert reshard(tmp_path / "source", tmp_path / "new", "--to", "xar-scale") == 65
    assert f"{path} is corrupt (its SHA-256 differs)" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_changed_pth_is_detected_by_its_archive_s_crc(tmp_path, capsys):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pth")
    flip_byte(tmp_path / "a.pth")
    assert reshard(tmp_path / "a.pth", tmp_path / "new", "--to", "safetensors") == 65
    assert "a.pth: a/data/0 is corrupt (its CRC-32 differs)" in capsys.readouterr().err


def test_a_disk_that_is_full_before_or_during_the_write(tmp_path, own, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert reshard(own, tmp_path / "new", "--to", "xar-scale") == 74
    assert "more bytes, the disk has 1,000" in capsys.readouterr().err

    write_block, count = writer._write, 0

    def full(file, offset, view):
        nonlocal count
        count += 1
        if count == 20:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        write_block(file, offset, view)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_write", full)
        assert reshard(own, tmp_path / "new", "--to", "xar-scale") == 74
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert reshard(own, tmp_path / "new", "--to", "xar-scale") == 0
    verify(tmp_path / "new")


@pytest.mark.parametrize(
    ("target", "size", "file"),
    [
        ("xar-scale", 10_000, "files/shard-00001-model-00001-of-00001.safetensors: File too large"),
        ("safetensors", 10_000, "files/model-00001-of-00001.safetensors: File too large"),
        ("xar-scale", 10, "journal: File too large"),
        ("pth", 100, "model.pth cannot be written; is the disk of .* full?"),
        ("pth", 10_000, "model.pth cannot be written; is the disk of .* full?"),
    ],
)
def test_the_file_that_does_not_fit_on_the_disk_is_named(tmp_path, own, capsys, largest_file, target, size, file):
    largest_file(size)
    assert reshard(own, tmp_path / "new", "--to", target) == 74
    largest_file(resource.RLIM_INFINITY)
    assert re.search(f"^reshard: /.*/{file}", capsys.readouterr().err)
    assert reshard(own, tmp_path / "new", "--to", target) == 0


def test_if_a_run_drops_the_checkpoint_meanwhile_a_newer_one_is_converted(tmp_path, monkeypatch, capsys):
    run, verified = Run(tmp_path / "run"), writer.verify_source
    run.train()
    first, later = run.save(), []

    def meanwhile(source, progress):
        if not later:
            run.train()
            later.append(run.save())
            shutil.rmtree(first)
        verified(source, progress)

    monkeypatch.setattr(writer, "verify_source", meanwhile)
    assert reshard(tmp_path / "run", tmp_path / "new", "--to", "xar-scale") == 0
    assert read_manifest(tmp_path / "new").manifest.step == 2
    assert f"{first} is gone: the run has dropped it; converting a newer checkpoint\n" in capsys.readouterr().out

    def each_time(source, progress):
        run.train()
        run.save()
        shutil.rmtree(source.path)
        verified(source, progress)

    with monkeypatch.context() as patch:  # not for ever
        patch.setattr(writer, "verify_source", each_time)
        assert reshard(tmp_path / "run", tmp_path / "never", "--to", "xar-scale") == 74
    assert capsys.readouterr().out.count("converting a newer checkpoint") == 2
    later.clear()
    first = run.store.newest
    assert reshard(first, tmp_path / "other", "--to", "xar-scale") == 74  # no other was asked for
    assert capsys.readouterr().err.startswith(f"reshard: {first}/")
