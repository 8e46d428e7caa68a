"""Rerun the batch of a report on one device, with the weights of a checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from xar_scale.checkpoint.load import check_shapes, config_difference, load_weights
from xar_scale.checkpoint.manifest import Checkpoint, checkpoint_paths, step_of, verify
from xar_scale.config import Config, merge
from xar_scale.data.loader import Batch
from xar_scale.diagnosis import Activations, Watch
from xar_scale.engines import Verdict, create_engine
from xar_scale.errors import ConfigError, DataError, UsageError
from xar_scale.model.entities import create_layout
from xar_scale.model.xar import blank_weights, meta_model
from xar_scale.precision import MODES
from xar_scale.reports import SavedReport
from xar_scale.validation import validated


@dataclass(frozen=True)
class Replayed:
    """The result of one attempt at the batch."""

    mode: str
    verdict: Verdict
    forward: str | None  # the first module whose output is not finite
    backward: str | None  # the first module whose output's gradient is not finite
    activations: dict[str, float]  # the largest of each block


def find_checkpoint(report: SavedReport) -> Checkpoint:
    """Return the run's newest checkpoint from the report's step or before. Raises UsageError if there is none."""
    run = report.path.resolve().parent.parent
    paths = [path for path in checkpoint_paths(run) if step_of(path) <= report.step]
    if not paths:
        raise UsageError(f"{run} holds no checkpoint of step {report.step} or before; name one with --checkpoint")
    return verify(paths[-1])


def replay(report: SavedReport, checkpoint: Checkpoint, device: torch.device) -> Iterator[Replayed]:
    """Attempt the reported rank's part of the step, in the precision in which it failed and then in its fallback.

    Raises ConfigError or DataError if the checkpoint is from another model than the report.
    """
    batches = [batch.to(device) for batch in report.batches]
    micro = len(batches[0].labels)
    sizes = {"engine": "single", "shard_ranks": None, "micro_batch": micro, "global_batch": micro * len(batches)}
    values = merge(report.config, {"train": sizes, "data": {"lanes": 1}})
    config = validated(Config, values, ConfigError, f"report {report.path}: ")
    if checkpoint.manifest.config and (differs := config_difference(checkpoint, config)):  # other formats have no config
        raise ConfigError(f"report {report.path}: {differs}")
    _check_batch(report, config)
    model = meta_model(config.model)
    engine = create_engine(model, blank_weights(model), config, device)
    check_shapes(checkpoint, engine.shapes)
    model.load_state_dict(load_weights(checkpoint, "model"))
    engine.rank = report.rank  # for its dropout
    for mode in filter(None, (report.mode, MODES[report.mode].fallback)):
        engine.set_precision(mode)
        engine.loss_scale = report.loss_scale if MODES[mode].scaled else 1.0
        with Watch(model) as watch, Activations(model) as activations:
            verdict = engine.attempt(report.step, batches)
        engine.discard()
        yield Replayed(mode, verdict, watch.forward, watch.backward, activations.largest)


def _check_batch(report: SavedReport, config: Config) -> None:
    """Raise DataError if the batch is not one of the config's model."""
    batch, classes = report.batches[0], config.model.classes
    wanted = Batch.zeros(create_layout(config.model), config.model.channels, len(batch.labels))
    for name in ("latents", "labels", "t", "noise", "places"):
        found, ours = getattr(batch, name), getattr(wanted, name)
        if (found.shape, found.dtype) != (ours.shape, ours.dtype):
            raise DataError(
                f"report {report.path}: {name} are {found.dtype}{[*found.shape]}, the model's {ours.dtype}{[*ours.shape]}"
            )
    for part in report.batches:
        if not ((part.labels >= 0) & (part.labels <= classes)).all():  # the last is the null class
            raise DataError(f"report {report.path}: its batch has labels outside 0..{classes}")
