"""Parameter groups, and the learning rate of a step as a pure function."""

import math
from typing import Any

import torch
from torch import nn

from xar_scale.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Weight decay for matrices and embeddings; none for one-dimensional parameters (norms and biases)."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def create_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of ``steps``: linear warm-up, constant, cosine to final_lr at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    begin = max(config.warmup_steps, steps - round(config.decay_share * steps))
    if step < begin:
        return config.lr
    progress = (step - begin) / (steps - begin)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
