"""A plan as files: the config that train takes, and the DeepSpeed settings that it names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from xar_scale.config import Config
from xar_scale.errors import UsageError
from xar_scale.files import make_folder, write_atomically
from xar_scale.memory.rank import Weights
from xar_scale.plan.search import Candidate, bucket

CONFIG, SETTINGS = "config.yaml", "ds_config.json"


def prepare(folder: Path) -> None:
    """Create ``folder`` before the search, so that an unusable one is reported at once.

    Raises UsageError if it holds files that no plan writes, OSError if it cannot be written.
    """
    if foreign := sorted({path.name for path in folder.glob("*")} - {CONFIG, SETTINGS}):
        raise UsageError(f"{folder} holds {foreign[0]}, which no plan writes: choose another --out")
    make_folder(folder)


def write(candidate: Candidate, weights: Weights, folder: Path) -> list[Path]:
    """Write the plan into a prepared folder, replacing an earlier plan, and return the paths."""
    config, written = candidate.config, {}
    if config.train.engine == "deepspeed":
        config = with_settings(config, folder / SETTINGS)
        written[folder / SETTINGS] = json.dumps(settings(weights), indent=2) + "\n"
    else:
        (folder / SETTINGS).unlink(missing_ok=True)  # of an earlier plan
    written[folder / CONFIG] = config.to_yaml()
    for path, text in written.items():
        write_atomically(path, text.encode())
    return [*written]


def with_settings(config: Config, path: Path) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, ds_config=str(path)))


def settings(weights: Weights) -> dict[str, Any]:
    """Return the DeepSpeed settings. Buckets have the size of a block, so that one block's weights are gathered and another's
    gradients reduced while a third computes; biases and norms are small and stay gathered."""
    size = bucket(weights)
    zero = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": size,
        "stage3_prefetch_bucket_size": size,
        "stage3_param_persistence_threshold": 100_000,
    }
    return {"zero_optimization": zero, "steps_per_print": 1_000_000_000, "wall_clock_breakdown": False}
