"""Ranges of vectors read from the chunks that files hold: no more than is owned, from as few files, each opened once."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.processes import environment
from tests.unit.foreign_checkpoints import reshard, values
from tests.unit.tiny_run import Run
from xar_scale.checkpoint import chunks as chunks_module
from xar_scale.checkpoint import vectors
from xar_scale.checkpoint.chunks import Chunk, ChunkReader, read_header
from xar_scale.checkpoint.manifest import read_manifest
from xar_scale.errors import DataError


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The checkpoint of an xar-scale run after two steps."""
    run = Run(tmp_path_factory.mktemp("own"))
    run.train(2)
    return run.save()


@pytest.mark.parametrize(
    ("chunks", "line"),
    [
        ([(0, 2), (3, 4)], "a continues at element 3, the chunks before it end at 2"),
        ([(0, 3), (2, 4)], "a continues at element 2, the chunks before it end at 3"),
        ([(0, 3)], "a must end at element 4, but its files end at 3"),
    ],
)
def test_chunks_that_leave_a_gap_overlap_or_end_early(tmp_path, chunks, line):
    (tmp_path / "file").write_bytes(bytes(16))
    with pytest.raises(DataError, match=line):
        ChunkReader({"a": [Chunk(*ends, tmp_path / "file", 0) for ends in chunks]}, {"a": (0, 4)})


def test_a_reader_that_cannot_open_a_file_leaves_none_open(tmp_path, monkeypatch):
    chunks = [Chunk(at, at + 1, tmp_path / str(at), 0) for at in range(3)]
    for chunk in chunks:
        chunk.path.write_bytes(bytes(4))
    opened, closed, really_open, really_close = [], [], os.open, os.close

    def two(path, *flags):
        if len(opened) == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        opened.append(really_open(path, *flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", two)
    monkeypatch.setattr(os, "close", lambda descriptor: closed.append(descriptor) or really_close(descriptor))
    with pytest.raises(OSError, match="Too many open files"):
        ChunkReader({"a": chunks}, {"a": (0, 3)})
    assert closed == opened and len(opened) == 2


@pytest.mark.parametrize(("limit", "opened"), [(1000, 5), (48, 10)])
def test_files_that_are_read_in_turn_stay_open_as_far_as_the_system_allows(tmp_path, monkeypatch, limit, opened):
    """A checkpoint of 512 ranks has 512 files, each with a part of every vector."""
    chunks = [Chunk(at, at + 1, tmp_path / str(at), 0) for at in range(5)]
    for chunk in chunks:
        chunk.path.write_bytes(np.float32(chunk.start).tobytes())
    opens, really_open = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *flags: opens.append(path) or really_open(path, *flags))
    monkeypatch.setattr(chunks_module, "OPEN_FILES", 2)
    monkeypatch.setattr(chunks_module, "allow_open_files", lambda: limit)
    with ChunkReader({"a": chunks, "b": chunks}, {"a": (0, 5), "b": (0, 5)}) as reader:
        for key in ("a", "b"):
            assert reader.whole(key, [5]).tolist() == [0, 1, 2, 3, 4]
    assert len(opens) == opened


def test_the_limit_of_open_files_is_raised():
    program = "import resource; from xar_scale.checkpoint.chunks import allow_open_files as allow; "
    program += (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 99)); print(allow(), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=400)
    assert done.stdout == "99 (99, 99)\n", done.stderr


@pytest.mark.parametrize(
    ("rank", "world", "files"), [(0, 1, 8), (1, 4, 2), (3, 4, 2), (1, 8, 1), (5, 8, 1), (15, 16, 1), (1, 3, 4)]
)
def test_a_rank_opens_as_few_files_as_hold_what_it_owns(tmp_path, own, monkeypatch, rank, world, files):
    assert reshard(own, tmp_path / "cut", "--to", "xar-scale", "--files", 8) == 0
    looked, state = [], values(own)
    monkeypatch.setattr(vectors, "read_header", lambda path: looked.append(path.name) or read_header(path))
    ends = {key: [tensor.numel() * at // world for at in (rank, rank + 1)] for key, tensor in state.items()}
    with vectors.open_ranges(read_manifest(tmp_path / "cut"), ends, rank, world) as opened:
        for key, (start, stop) in ends.items():
            out = torch.empty(stop - start)
            opened.read(key, start, out)
            assert torch.equal(out, state[key].view(-1)[start:stop])
            with pytest.raises(DataError, match=f"{key} has no element"):
                opened.read(key, start - 1, torch.empty(1))
    assert len(looked) == files


def test_missing_vectors_and_ranges_are_named(tmp_path, own):
    key = "model/in_proj.weight"
    with pytest.raises(DataError, match=f"{key} must end at element 999, but its files end at"):
        vectors.open_ranges(read_manifest(own), {key: (3, 999)}, 0, 1)
    with pytest.raises(DataError, match="lack 1 vectors, first model/nothing"):
        vectors.open_ranges(read_manifest(own), {"model/nothing": (0, 1)}, 0, 1)
    with pytest.raises(DataError, match="but no other"):
        vectors.open_ranges(read_manifest(own), {"other/in_proj.weight": (0, 1)}, 0, 1)


@pytest.mark.parametrize(
    ("place", "start"),
    [
        ({"data_offsets": [-16, 0]}, 0),
        ({"data_offsets": [0.0, 16.0]}, 0),
        ({"shape": [-4], "data_offsets": [16, 0]}, 4),
        ({}, -4),
        ({}, 0.0),
    ],
)
def test_impossible_places_in_a_checkpoints_file_are_refused(tmp_path, own, place, start):
    shutil.copytree(own, tmp_path / "own")
    (path,) = (tmp_path / "own").glob("*.safetensors")
    key = "model/in_proj.bias"
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | place
    saved = json.dumps({key: {"saved_offsets": [start]}})
    header = json.dumps({"__metadata__": {"DCP_SHARDING_INFO": saved}, key: entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(DataError, match=f"{path.name} is not a file of flat float32 vectors"):
        vectors.open_ranges(read_manifest(tmp_path / "own"), {key: (0, 4)}, 0, 1)
