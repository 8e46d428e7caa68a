"""Load a checkpoint into an engine on any number of ranks, each reading what it owns; or unsharded, into one process."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from xar_scale import dist
from xar_scale.checkpoint.manifest import Checkpoint
from xar_scale.checkpoint.vectors import check_kinds, open_ranges, open_vectors
from xar_scale.config import Config
from xar_scale.data.shards import DatasetInfo
from xar_scale.ema import EMA, POWER_KINDS
from xar_scale.engines import Engine
from xar_scale.errors import ConfigError, DataError


def check_resumable(checkpoint: Checkpoint, config: Config, info: DatasetInfo) -> None:
    """Raise ConfigError, with both values, if ``config`` cannot continue the checkpoint exactly."""
    manifest = checkpoint.manifest
    if not manifest.config:
        raise ConfigError(
            f"checkpoint {checkpoint.path} was converted from another format and has no run to resume: use --init-from"
        )
    others = ("train.seed", "train.global_batch", "train.label_drop", "data.lanes", "data.window", "data.flip")
    if differs := config_difference(checkpoint, config, others):
        raise ConfigError(f"{differs}: not an exact continuation")
    if manifest.dataset["fingerprint"] != info.fingerprint:
        raise ConfigError(
            f"{config.data.path} ({info.samples} samples) is not the data set that checkpoint {checkpoint.path} was made "
            f"with ({manifest.dataset['samples']} samples): its data position would refer to other samples"
        )
    if manifest.step > config.train.steps:
        raise ConfigError(f"train.steps is {config.train.steps}, but checkpoint {checkpoint.path} is at step {manifest.step}")
    if config.optim.ema_snapshots_every and (missing := sorted(set(POWER_KINDS) - set(manifest.kinds))):
        raise ConfigError(
            f"optim.ema_snapshots_every is {config.optim.ema_snapshots_every}, but checkpoint {checkpoint.path} was made "
            f"without it and holds no {missing[0]}: these EMAs must start with the run"
        )


def config_difference(checkpoint: Checkpoint, config: Config, others: Sequence[str] = ()) -> str | None:
    """Describe the first setting of the model, or in ``others``, that differs from the checkpoint's; None if none does."""
    old, new = checkpoint.manifest.config, config.to_dict()
    for key in (*(f"model.{name}" for name in new["model"]), *others):
        section, name = key.split(".")
        before, now = old.get(section, {}).get(name), new[section][name]
        if before != now:
            return f"{key} is {now}, checkpoint {checkpoint.path} was made with {before}"
    return None


def check_shapes(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise DataError naming the first parameter whose shape differs from ``shapes``."""
    theirs, ours = checkpoint.manifest.shapes, {name: list(shape) for name, shape in shapes.items()}
    for name in ours | theirs:
        if (there := theirs.get(name)) != (here := ours.get(name)):
            raise DataError(f"checkpoint {checkpoint.path}: {name} is {there}, the model's is {here}")


def load(checkpoint: Checkpoint, engine: Engine, ema: EMA) -> int:
    """Load weights, Adam moments and EMAs. Every rank calls this and reads what it owns, its part of it if other replicas own
    it too. Returns the bytes that it read."""
    owned = state_vectors(engine, ema)

    def read() -> int:
        check_shapes(checkpoint, engine.shapes)
        check_kinds(checkpoint, state_kinds(ema))
        parts = parts_of(owned, engine)
        spans = {key: (start, start + tensor.numel()) for key, start, tensor in parts}
        with open_ranges(checkpoint, spans, dist.rank(), dist.world()) as files:
            for key, start, tensor in parts:
                if tensor.device.type == "cpu":
                    files.read(key, start, tensor)
                else:
                    host = torch.empty(tensor.shape)
                    files.read(key, start, host)
                    tensor.copy_(host)
            return files.bytes_read

    count = dist.on_all_ranks(read)
    engine.share([tensor for _, _, tensor in owned])
    engine.shards_written(checkpoint.manifest.updates)
    return count


def load_weights(checkpoint: Checkpoint, which: str) -> dict[str, Tensor]:
    """Return unsharded weights for one process. ``which``: one of the checkpoint's kinds."""
    with open_vectors(checkpoint, which) as files:
        shapes = checkpoint.manifest.shapes
        return {name: files.whole(f"{which}/{name}", shape) for name, shape in shapes.items()}


def state_kinds(ema: EMA) -> tuple[str, ...]:
    """Return the kinds of vectors in a checkpoint of the run: ``KINDS``, with any further EMAs after ``ema``."""
    return "model", *ema.averages, "exp_avg", "exp_avg_sq"


def state_vectors(engine: Engine, ema: EMA) -> list[tuple[str, int, Tensor]]:
    """Return what this rank owns of all that a checkpoint holds: key, first element, and a view of the values from there."""
    vectors = []
    for shard, averages in zip(engine.shards(), zip(*ema.averages.values(), strict=True), strict=True):
        tensors = (shard.master, *averages, shard.exp_avg, shard.exp_avg_sq)
        for kind, tensor in zip(state_kinds(ema), tensors, strict=True):
            if tensor.numel():
                vectors.append((f"{kind}/{shard.name}", shard.start, tensor))
    return vectors


def parts_of(vectors: Sequence[tuple[str, int, Tensor]], engine: Engine) -> list[tuple[str, int, Tensor]]:
    """Return what this rank writes and reads of vectors that it owns: all of them, or its part where other replicas own them
    too."""
    parts = ((key, start, tensor, engine.own_part(tensor.numel())) for key, start, tensor in vectors)
    return [(key, start + part.start, tensor[part]) for key, start, tensor, part in parts if part.stop > part.start]
