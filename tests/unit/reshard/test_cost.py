"""Memory of a conversion, and its benchmark."""

import argparse
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT, environment
from tests.unit.foreign_checkpoints import TARGETS
from tests.unit.tiny_run import CONFIG
from xar_scale.bench import reshard as bench
from xar_scale.checkpoint.files import fingerprint
from xar_scale.checkpoint.interop import Source, official_names
from xar_scale.checkpoint.interop.source import InMemory
from xar_scale.checkpoint.manifest import KINDS
from xar_scale.checkpoint.reshard import plan
from xar_scale.errors import DataError

MEASURED = """
    import resource, sys
    from tests.unit.foreign_checkpoints import reshard
    for target in sys.argv[3:]:
        assert reshard(sys.argv[1], f"{sys.argv[2]}/{target}", "--to", target) == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mib(source: Path, destination: Path) -> float:
    """Peak memory of a process that makes all targets."""
    words = [sys.executable, "-c", textwrap.dedent(MEASURED), str(source), str(destination), *TARGETS]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) / 1024


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Two xar-scale checkpoints of 16 and 80 MiB whose files are holes; one tensor of the network has nearly all elements."""
    folder = tmp_path_factory.mktemp("sparse")
    names = official_names(CONFIG.model).values()
    for scale in (1, 5):
        shapes = {name: torch.Size((1 << 20, scale) if name == "class_embed.weight" else (2,)) for name in names}
        made = Source(
            folder, "zeros", {f"{kind}/{name}": shape for kind in KINDS for name, shape in shapes.items()}, InMemory({}), []
        )
        (folder / str(scale)).mkdir()
        for output in (planned := plan(made, "xar-scale", files=1)).outputs:
            path = folder / str(scale) / output.name
            path.write_bytes(output.parts[0].content)
            os.truncate(path, output.size)
        path.with_name("manifest.json").write_bytes(planned.last({path.name: fingerprint(path)})[1])
    return folder


def test_memory_does_not_grow_with_the_checkpoint(tmp_path, sparse):
    small, large = (peak_mib(sparse / scale, tmp_path / scale) for scale in ("1", "5"))
    assert large - small < 8, (small, large)


def test_the_benchmark_measures_time_and_memory_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "CONVERSIONS", [(bench.ZEROS, "safetensors", "a")])
    bench.bench_reshard(argparse.Namespace(model="nano", data=tmp_path / "bench"))
    (row,) = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "safetensors" in line]
    assert 0 < float(row[2]) < 0.1 and float(row[3]) > 0 and int(row[4].rstrip(" |")) > 100
    assert list((tmp_path / "bench").iterdir()) == []
    with pytest.raises(DataError, match="exited with code 64"):
        bench._measured("tools/reshard.py", str(tmp_path / "nothing"), str(tmp_path / "new"), "--to", "pth")
