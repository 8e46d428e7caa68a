"""What several measurements start from: the config of a model, an engine and its EMA."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from xar_scale.config import Config, merge
from xar_scale.ema import EMA
from xar_scale.engines import Engine, create_engine
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import XAR, Weight, meta_model
from xar_scale.precision import MODES
from xar_scale.presets import model_values, recipe


def config_with(model_name: str, **changes: dict[str, Any]) -> Config:
    """Return imagenet256_h's config with the sizes of a model, one lane (any batch is valid), and ``changes`` by section."""
    values = merge(recipe("imagenet256_h"), {"model": model_values(model_name), "data": {"lanes": 1}})
    return Config.from_dict(merge(values, changes))


def engine_and_ema(config: Config, weights: Callable[[XAR], Iterable[Weight]], device: torch.device) -> tuple[Engine, EMA, str]:
    """Return them as in training, with ``weights`` of the network, and which kernels compute it."""
    model = meta_model(config.model)
    kernels = model.use_kernels(config.kernels, device, MODES[config.train.precision].compute, training=True)
    apply_recompute(model.blocks, config.train.recompute, compiled=config.kernels.compile)
    engine = create_engine(model, weights(model), config, device)
    return engine, EMA([shard.master for shard in engine.shards()], config.optim.ema_decay), kernels
