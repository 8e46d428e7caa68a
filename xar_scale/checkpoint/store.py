"""Checkpoints on disk: written whole or not at all, checked before they are used, one format for every engine and size.

A checkpoint is a folder ``step-00001000`` with PyTorch DCP files in safetensors format and ``manifest.json``. Every tensor
is a flat float32 vector, cut over ranks anywhere: ``model/NAME``, ``ema/NAME``, ``exp_avg/NAME``,
``exp_avg_sq/NAME``. So what ZeRO-3 wrote on any number of ranks loads on any other, or on one process, without conversion.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from xar_scale import dist
from xar_scale.checkpoint.flat import FlatShard
from xar_scale.config import Config
from xar_scale.data.faults import BadSamples
from xar_scale.data.order import Position
from xar_scale.data.shards import DatasetInfo
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.errors import ConfigError, DataError, UsageError
from xar_scale.files import free_name, sync_folder, write_atomically
from xar_scale.guard import GuardState

FORMAT = 3
FOLDER, MANIFEST, LATEST = "checkpoints", "manifest.json", "latest"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. There is no generator state: every draw of a run follows from (seed, step, sample number)."""

    format: int
    step: int  # steps taken
    seed: int
    samples_consumed: int  # of the run
    position: Position  # epoch, samples consumed of it
    bad_samples: list[tuple[str, int]]  # that the run has met, by shard and position in it
    quarantined: list[tuple[str, int]]  # samples that the guard has taken out, likewise
    guard: GuardState
    dataset: dict[str, Any]  # samples and fingerprint; tokenizer and latent scale, which decoding needs
    world: int  # ranks that wrote it
    engine: str
    precision: str
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest could be read."""

    path: Path
    manifest: Manifest


class Store:
    """Writes the checkpoints of one run, in ``RUN/checkpoints``."""

    def __init__(self, run: Path, keep_last: int) -> None:
        self.folder, self.keep_last = run / FOLDER, keep_last

    def save(
        self,
        step: int,
        engine: Engine,
        ema: EMA,
        config: Config,
        position: Position,
        info: DatasetInfo,
        bad: BadSamples,
        quarantined: Iterable[tuple[str, int]],
        guard: GuardState,
    ) -> Path:
        """Write all ranks' shards, then make the checkpoint appear at once and ``latest`` name it. Every rank calls this."""
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        dist.on_rank_0(lambda: _empty_folder(temporary))
        with _quiet_dcp():
            dcp.save(
                _state(engine, ema),
                storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                no_dist=not torch.distributed.is_initialized(),
            )
        # the union: on a network file system a rank is sure to see only what it wrote itself
        seen = dist.together(lambda: {path.name for path in temporary.iterdir()})
        names = set().union(*dist.gather_objects(seen))
        fingerprints = dist.together(lambda: {name: _fingerprint(temporary / name) for name in dist.mine(sorted(names))})
        files = {name: entry for part in dist.gather_objects(fingerprints) for name, entry in part.items()}
        manifest = Manifest(
            format=FORMAT,
            step=step,
            seed=config.train.seed,
            samples_consumed=step * config.train.global_batch,
            position=position,
            bad_samples=sorted(bad.known),
            quarantined=sorted(quarantined),
            guard=guard,
            dataset={
                "samples": info.samples,
                "fingerprint": info.fingerprint,
                "tokenizer": info.tokenizer,
                "latent_scale": info.latent_scale,
            },
            world=dist.world(),
            engine=config.train.engine,
            precision=engine.mode,
            config=config.to_dict(),
            shapes={shard.name: list(shard.shape) for shard in engine.shards()},
            files=dict(sorted(files.items())),
        )
        dist.on_rank_0(lambda: self._publish(manifest, temporary, final))
        return final

    def _publish(self, manifest: Manifest, temporary: Path, final: Path) -> None:
        """One rename makes it visible; only then does anything older go."""
        values = {**asdict(manifest), "guard": manifest.guard.to_dict()}
        write_atomically(temporary / MANIFEST, json.dumps({"sha256": _digest(values), **values}, indent=1).encode())
        sync_folder(temporary)
        temporary.rename(final)
        sync_folder(self.folder)
        write_atomically(self.folder / LATEST, f"{final.name}\n".encode())
        for stale in [*checkpoint_paths(self.folder.parent)[: -self.keep_last], *self.folder.glob(".step-*.tmp")]:
            shutil.rmtree(stale, ignore_errors=True)

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps, damaged ones that resuming passed over, so that they neither count nor block."""
        for path in checkpoint_paths(self.folder.parent):
            if step_of(path) > step:
                path.rename(free_name(path.with_name(f"damaged-{path.name}")))


def checkpoint_paths(run: Path) -> list[Path]:
    """The run's checkpoints by name, oldest first, whole or damaged."""
    paths = [path for path in (run / FOLDER).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(paths, key=step_of)


def newest_valid(run: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are all as written; None when there is none at all.

    A damaged one is reported and the one before it tried. Raises DataError when there are some and none is valid.
    Every rank calls this, and checks a share of the files.
    """
    paths = dist.on_rank_0(lambda: checkpoint_paths(run))
    for path in reversed(paths):
        try:
            return dist.together(lambda at=path: verify(at))  # type: ignore[misc]
        except DataError as error:
            dist.say(f"{error}; trying the checkpoint before it")
    if paths:
        raise DataError(f"none of the {len(paths)} checkpoints in {run / FOLDER} is valid; another --run-dir starts anew")
    return None


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _empty_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def read_manifest(path: Path) -> Checkpoint:
    """Raises UsageError when there is no checkpoint, DataError when its manifest is torn, changed or of another format."""
    if not path.is_dir():
        raise UsageError(f"no checkpoint at {path}")
    try:
        values = json.loads((path / MANIFEST).read_text())
        if values["format"] != FORMAT:
            raise DataError(f"checkpoint {path} is of format {values['format']}, this version reads {FORMAT}")
        if values.pop("sha256") != _digest(values):
            raise DataError(f"checkpoint {path}: {MANIFEST} is torn or changed")
        typed = {"position": Position(*values["position"]), "guard": GuardState.from_dict(values["guard"])}
        return Checkpoint(path, Manifest(**(values | typed)))
    except FileNotFoundError:
        raise DataError(f"checkpoint {path} has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"checkpoint {path}: {MANIFEST} is torn or changed") from None


def verify(path: Path) -> Checkpoint:
    """Check this rank's share of the files, by size and SHA-256. Raises DataError naming the first that differs."""
    checkpoint = read_manifest(path)
    files = checkpoint.manifest.files
    if extra := {file.name for file in path.glob("*.safetensors")} - set(files):
        raise DataError(f"checkpoint {path}: {min(extra)} is not one of its files")
    for name in dist.mine(list(files)):
        if not (path / name).is_file():
            raise DataError(f"checkpoint {path}: {name} is missing")
        if _fingerprint(path / name) != files[name]:
            raise DataError(f"checkpoint {path}: {name} is not as it was written (size or checksum differs)")
    return checkpoint


def check_continues(checkpoint: Checkpoint, config: Config, info: DatasetInfo) -> None:
    """Raises ConfigError when ``config`` cannot continue the checkpoint exactly, with both values."""
    manifest, old, new = checkpoint.manifest, checkpoint.manifest.config, config.to_dict()
    keys = [f"model.{key}" for key in new["model"]]
    keys += ["train.seed", "train.global_batch", "train.label_drop", "data.lanes", "data.window", "data.flip"]
    for key in keys:
        section, name = key.split(".")
        before, now = old.get(section, {}).get(name), new[section][name]
        if before != now:
            raise ConfigError(f"{key} is {now}, checkpoint {checkpoint.path} was made with {before}: it would not continue")
    if manifest.dataset["fingerprint"] != info.fingerprint:
        raise ConfigError(
            f"{config.data.path} ({info.samples} samples) is not the data set that checkpoint {checkpoint.path} was made "
            f"with ({manifest.dataset['samples']} samples): its data position would mean another sample"
        )
    if manifest.step > config.train.steps:
        raise ConfigError(f"train.steps is {config.train.steps}, checkpoint {checkpoint.path} has taken {manifest.step}")


def load(checkpoint: Checkpoint, engine: Engine, ema: EMA) -> None:
    """Fill weights, moments and averages. Every rank reads only what it owns."""
    with _quiet_dcp():
        dcp.load(
            _state(engine, ema),
            storage_reader=HuggingFaceStorageReader(str(checkpoint.path)),
            no_dist=not torch.distributed.is_initialized(),
        )
    engine.shards_written(checkpoint.manifest.step - checkpoint.manifest.guard.skipped)


def load_weights(checkpoint: Checkpoint, which: str = "ema") -> dict[str, Tensor]:
    """Whole weights for one process: ``which`` is "ema" or "model"."""
    shapes = checkpoint.manifest.shapes
    flat = {f"{which}/{name}": torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
    with _quiet_dcp():
        dcp.load(flat, storage_reader=HuggingFaceStorageReader(str(checkpoint.path)), no_dist=True)
    return {name: flat[f"{which}/{name}"].view(shape) for name, shape in shapes.items()}


def _state(engine: Engine, ema: EMA) -> dict[str, Tensor]:
    """Views of everything that a checkpoint holds, under its names."""
    state: dict[str, Tensor] = {}
    for shard, average in zip(engine.shards(), ema.averages, strict=True):
        tensors = {"model": shard.master, "ema": average, "exp_avg": shard.exp_avg, "exp_avg_sq": shard.exp_avg_sq}
        for kind, tensor in tensors.items():
            state[f"{kind}/{shard.name}"] = FlatShard(tensor, shard.start, shard.shape.numel())
    return state


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of plain values, the same after a trip through a file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@contextlib.contextmanager
def _quiet_dcp() -> Iterator[None]:
    """DCP warns that it runs on one process when that is what was asked for."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*")
        try:
            yield
        finally:
            logger.setLevel(level)
