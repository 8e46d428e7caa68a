"""Parameter groups, AdamW, and the learning rate as a pure function of the step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xar_scale.config import KernelLibrary, OptimConfig


def parameter_groups(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], config: OptimConfig
) -> list[dict[str, Any]]:
    """Return two groups: weight decay for matrices and embeddings, none for one-dimensional parameters (norms and biases).

    ``shapes``: the unsharded shapes by name; ``parameters`` may be shards.
    """
    decayed = [parameter for name, parameter in parameters.items() if len(shapes[name]) > 1]
    plain = [parameter for name, parameter in parameters.items() if len(shapes[name]) <= 1]
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def create_adamw(
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    config: OptimConfig,
    device: torch.device,
    library: KernelLibrary = "torch",
) -> torch.optim.Optimizer:
    """Return AdamW. ``shapes``: the unsharded shapes by name; ``parameters`` may be shards. ``device``: where it steps them."""
    groups = parameter_groups(parameters, shapes, config)
    if library == "apex":
        from apex.optimizers import FusedAdam  # it counts steps per group, not per parameter

        return FusedAdam(groups, lr=config.lr, betas=config.betas, eps=config.eps, adam_w_mode=True)
    # on a CPU fused AdamW's rounding depends on where a tensor is sharded: other numbers of ranks would not agree bitwise
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=device.type == "cuda" or None)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of step ``step`` (from 0) of ``steps``: linear warm-up, constant, cosine decay to final_lr at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    begin = max(config.warmup_steps, steps - round(config.decay_share * steps))
    if step < begin:
        return config.lr
    progress = (step - begin) / (steps - begin)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
