"""Engines of a small model, and steps of them."""

import torch

from tests.conftest import digits_config, random_batch
from tests.unit.conftest import CPU
from xar_scale.engines import Engine, create_engine
from xar_scale.model.xar import initial_weights, meta_model


def engine_of(*overrides: str) -> Engine:
    config = digits_config("train.engine=fsdp2", "train.global_batch=8", *overrides)
    model = meta_model(config.model)
    return create_engine(model, initial_weights(model, 0), config, CPU)


def losses(engine: Engine, *steps: int) -> list[float]:
    """Of steps that are taken."""
    found = []
    for step in steps:
        verdict = engine.attempt(step, [random_batch(step)])
        engine.step(1e-2, verdict)
        found.append(verdict.loss)
    return found


def state(engine: Engine) -> list[torch.Tensor]:
    return [tensor.clone() for shard in engine.shards() for tensor in (shard.master, shard.exp_avg, shard.exp_avg_sq)]


def take_over(engine: Engine, trained: Engine, steps: int) -> None:
    """Return the state of an engine after ``steps``."""
    with torch.no_grad():
        for shard, wanted in zip(engine.shards(), trained.shards(), strict=True):
            for tensor, value in zip(shard[4:], wanted[4:], strict=True):
                tensor.copy_(value)
    engine.shards_written(steps)
