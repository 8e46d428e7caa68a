"""Engines by name: how a model is distributed over ranks and stepped."""

from collections.abc import Iterable

import torch

from xar_scale.config import Config
from xar_scale.engines.base import Engine, Shard, Verdict
from xar_scale.model.xar import XAR, Weight

__all__ = ["Engine", "Shard", "Verdict", "create_engine"]


def create_engine(model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> Engine:
    """Return the engine that ``train.engine`` names; an engine's library is imported only when it is used.

    ``model`` may be on the meta device. ``weights`` yields all of its parameters; the engine takes them one at a time and keeps
    this rank's shard of each.
    """
    if config.train.engine == "deepspeed":
        from xar_scale.engines.deepspeed import create_deepspeed_engine

        return create_deepspeed_engine(model, weights, config, device)
    if config.train.engine == "fsdp2":
        from xar_scale.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(model, weights, config, device)
    if config.train.engine == "ddp":
        from xar_scale.engines.ddp import DDPEngine

        return DDPEngine(model, weights, config, device)
    from xar_scale.engines.single import SingleEngine

    return SingleEngine(model, weights, config, device)
