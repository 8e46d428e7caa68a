"""DeepSpeed ZeRO: moments, gradients and weights sharded over the ranks, as far as the stage goes. Only this package uses
DeepSpeed.

Private names are used where DeepSpeed has no public ones. Each is marked with the version it was read from.
"""

from collections.abc import Iterable

import torch

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.engines.base import Engine
from xar_scale.engines.deepspeed.settings import deepspeed_settings
from xar_scale.model.xar import XAR, Weight

__all__ = ["create_deepspeed_engine", "deepspeed_settings"]


def create_deepspeed_engine(model: XAR, weights: Iterable[Weight], config: Config, device: torch.device) -> Engine:
    """Return the engine of the configured ZeRO stage.

    Raises ConfigError if the DeepSpeed config contradicts ours or asks for something that is not supported here.
    """
    settings = deepspeed_settings(config, dist.world())
    if settings["zero_optimization"]["stage"] == 3:
        from xar_scale.engines.deepspeed.stage3 import ZeRO3Engine

        return ZeRO3Engine(model, weights, config, device, settings)
    from xar_scale.engines.deepspeed.stage12 import ZeRO12Engine

    return ZeRO12Engine(model, weights, config, device, settings)
