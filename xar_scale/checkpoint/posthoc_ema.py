"""Post-hoc EMA: a run's EMA snapshots combined into an EMA of another width, as a checkpoint that images are drawn from."""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xar_scale.checkpoint.chunks import ChunkReader
from xar_scale.checkpoint.files import BLOCK, FLOAT32, file_name, write_blocks
from xar_scale.checkpoint.manifest import EMA_SNAPSHOTS, MANIFEST, Checkpoint, checkpoint_paths, read_manifest, step_of, verify
from xar_scale.checkpoint.vectors import open_vectors
from xar_scale.ema import POWER_KINDS
from xar_scale.errors import DataError, UsageError
from xar_scale.files import publish, write_atomically
from xar_scale.posthoc import MAX_WIDTH, Fit, Profile, fit

MAX_RESIDUAL = 0.05  # the largest relative error that a fit may have
WIDTHS_TRIED = np.arange(0.005, MAX_WIDTH, 0.001)  # when searching for the nearest width that the snapshots allow


def open_snapshots(run: Path, step: int | None) -> list[Checkpoint]:
    """Return the snapshots up to ``step``, which must have one (None: all), oldest first. Their files are not checked.

    Without those from before the first update: an EMA has no profile there.
    """
    paths = checkpoint_paths(run, EMA_SNAPSHOTS)
    if not paths:
        raise UsageError(f"no EMA snapshots in {run / EMA_SNAPSHOTS}: training writes them if optim.ema_snapshots_every is set")
    steps = [step_of(path) for path in paths]
    if step is not None and step not in steps:
        raise UsageError(f"there is no snapshot of --step {step}; available: {', '.join(map(str, steps))}")
    snapshots = [read_manifest(path) for path, at in zip(paths, steps, strict=True) if step is None or at <= step]
    snapshots = [snapshot for snapshot in snapshots if snapshot.manifest.updates]
    if not snapshots:
        until = steps[-1] if step is None else step
        raise UsageError(f"no snapshot in {run / EMA_SNAPSHOTS} has any update up to step {until}: all steps were skipped")
    newest = snapshots[-1].manifest
    for snapshot in snapshots:
        if (snapshot.manifest.shapes, snapshot.manifest.kinds) != (newest.shapes, newest.kinds):
            raise DataError(f"snapshot {snapshot.path} belongs to another model than {snapshots[-1].path}")
    return snapshots


def fit_to(snapshots: Sequence[Checkpoint], sigma_rel: float) -> Fit:
    """Return the factors of the stored EMAs (snapshot by snapshot, kind by kind) that give ``sigma_rel`` at the last snapshot.

    Raises UsageError, with the nearest width that can be made, if the error of the fit exceeds ``MAX_RESIDUAL``.
    """
    if not 0 < sigma_rel < MAX_WIDTH:
        raise UsageError(f"--std {sigma_rel:g} is not a width: it must lie between 0 and {MAX_WIDTH:.4f} (a uniform average)")
    updates = snapshots[-1].manifest.updates
    stored = [Profile(snapshot.manifest.updates, width) for snapshot in snapshots for width in POWER_KINDS.values()]
    found = fit(stored, Profile(updates, sigma_rel))
    if found.residual > MAX_RESIDUAL:
        able = [width for width in WIDTHS_TRIED if fit(stored, Profile(updates, float(width))).residual <= MAX_RESIDUAL]
        nearest = min(able, key=lambda width: abs(width - sigma_rel))
        raise UsageError(
            f"--std {sigma_rel:g} cannot be made from {len(snapshots)} snapshots, updates {snapshots[0].manifest.updates} to "
            f"{updates}: the nearest profile has an error of {found.residual:.2%}, above the limit of {MAX_RESIDUAL:.0%}; "
            f"the nearest possible --std is {nearest:.3f}, others need more snapshots"
        )
    return found


def write_ema(snapshots: Sequence[Checkpoint], factors: Sequence[float], sigma_rel: float, out: Path) -> Checkpoint:
    """Write the sum of the stored EMAs, each times its factor, as a checkpoint of kind ``ema`` alone. The write is atomic.

    Raises UsageError if ``out`` exists, DataError if a snapshot's file is corrupt.
    """
    if out.exists():
        raise UsageError(f"{out} already exists")
    for snapshot in snapshots:
        verify(snapshot.path)
    elements = {name: math.prod(shape) for name, shape in snapshots[-1].manifest.shapes.items()}
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    path = temporary / file_name(0)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_vectors(snapshot)) for snapshot in snapshots]
        parts = [(files, kind) for files in opened for kind in POWER_KINDS]
        blocks = (block for name in elements for block in _sums(parts, factors, name, elements[name]))
        written = write_blocks(path, {f"ema/{name}": (0, count) for name, count in elements.items()}, blocks)
    manifest = replace(snapshots[-1].manifest, kinds=("ema",), sigma_rel=sigma_rel, world=1, files={path.name: written})
    write_atomically(temporary / MANIFEST, manifest.to_json())
    publish(temporary, out)
    return Checkpoint(out, manifest)


def _sums(parts: Sequence[tuple[ChunkReader, str]], factors: Sequence[float], name: str, elements: int) -> Iterator[Tensor]:
    """Yield one vector of the new EMA, block by block, summed in float64."""
    for start in range(0, elements, BLOCK // FLOAT32):
        block = torch.empty(min(elements - start, BLOCK // FLOAT32))
        total = torch.zeros(len(block), dtype=torch.float64)
        for (files, kind), factor in zip(parts, factors, strict=True):
            files.read(f"{kind}/{name}", start, block)
            total.add_(block, alpha=float(factor))
        yield block.copy_(total)
