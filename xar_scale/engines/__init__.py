"""Engines, by name: how a model is spread over ranks and stepped."""

import torch

from xar_scale.config import Config
from xar_scale.engines.base import Engine, Shard, Verdict
from xar_scale.model.xar import XAR

__all__ = ["Engine", "Shard", "Verdict", "create_engine"]


def create_engine(model: XAR, config: Config, device: torch.device) -> Engine:
    """The engine that ``train.engine`` names; an engine's library is imported only when it is asked for."""
    if config.train.engine == "deepspeed":
        from xar_scale.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, device)
    from xar_scale.engines.single import SingleEngine

    return SingleEngine(model, config, device)
