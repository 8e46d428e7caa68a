"""Time and memory of converting a checkpoint of a model's size to other formats."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from xar_scale.checkpoint.files import fingerprint
from xar_scale.checkpoint.interop.source import InMemory, Source
from xar_scale.checkpoint.manifest import KINDS
from xar_scale.checkpoint.reshard import plan
from xar_scale.checkpoint.reshard.parts import Fixed
from xar_scale.config import ModelConfig
from xar_scale.errors import DataError
from xar_scale.model.xar import meta_model
from xar_scale.presets import model_values

STDOUT = 1
ZEROS = "xar-scale"
# source folder, target format, target folder
CONVERSIONS = [
    (ZEROS, "safetensors", "a"),
    (ZEROS, "pth", "b"),
    (ZEROS, "universal", "universal"),
    ("universal", "xar-scale", "c"),
]


def bench_reshard(options: argparse.Namespace) -> None:
    """Run each conversion in its own process. The first source is a sparse file of zeros; outputs are written in full."""
    options.data.mkdir(parents=True, exist_ok=True)
    size = _zeros(options.model, options.data / ZEROS)
    print(f"{options.model}, weights, EMA and moments: {size / 1e9:.2f} GB\n")
    print("| from | to | GB written | seconds | peak memory, MiB |\n| --- | --- | --- | --- | --- |")
    for source, target, name in CONVERSIONS:
        destination = options.data / name
        seconds, peak = _measured("tools/reshard.py", str(options.data / source), str(destination), "--to", target)
        written = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
        print(f"| {source} | {target} | {written / 1e9:.2f} | {seconds:.1f} | {peak / 1024:.0f} |", flush=True)
        if name not in {source for source, _, _ in CONVERSIONS}:
            shutil.rmtree(destination)
    for name in {source for source, _, _ in CONVERSIONS}:
        shutil.rmtree(options.data / name)


def _zeros(model: str, folder: Path) -> int:
    """Write a checkpoint of ours as one sparse file; return its size in bytes."""
    sizes = ModelConfig(**model_values(model))
    shapes = {name: parameter.shape for name, parameter in meta_model(sizes).named_parameters()}
    zeros = Source(folder, "zeros", {f"{kind}/{name}": shapes[name] for kind in KINDS for name in shapes}, InMemory({}), [])
    planned = plan(zeros, "xar-scale", files=1)
    (output,) = planned.outputs
    folder.mkdir()
    path = folder / output.name
    path.write_bytes(b"".join(part.content for part in output.parts if isinstance(part, Fixed)))
    os.truncate(path, output.size)
    name, content = planned.last({output.name: fingerprint(path)})
    (folder / name).write_bytes(content)
    return output.size


def _measured(*words: str) -> tuple[float, int]:
    """Run a program; return its seconds and its peak resident set in KiB."""
    begun = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, STDOUT, os.devnull, os.O_WRONLY, 0)]
    child = os.posix_spawn(sys.executable, [sys.executable, *words], os.environ, file_actions=quiet)
    _, status, usage = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise DataError(f"{' '.join(words)} exited with code {code}")
    return time.perf_counter() - begun, usage.ru_maxrss
