"""One table of models and recipes: everything published or tried, as plain values for the config."""

from typing import Any

from xar_scale.config import Config, merge
from xar_scale.errors import UsageError

MODELS: dict[str, dict[str, Any]] = {
    # name      width  blocks each  heads
    "nano": dict(width=128, depth_encoder=2, depth_decoder=2, heads=4),
    "xar_b": dict(width=768, depth_encoder=8, depth_decoder=8, heads=12),
    "xar_l": dict(width=1024, depth_encoder=16, depth_decoder=16, heads=16),
    "xar_h": dict(width=1280, depth_encoder=20, depth_decoder=20, heads=16),
}

RECIPES: dict[str, dict[str, Any]] = {
    # scikit-learn's 8x8 digits as a 4x4 grid of 2x2-pixel tokens: two minutes on two CPU cores
    "digits": dict(
        model=dict(MODELS["nano"], channels=4, grid=[4, 4], entity_size=2, classes=10),
        data=dict(path="runs/demo/data", workers=1),
        optim=dict(lr=2e-3, warmup_steps=50, decay_share=0.5, weight_decay=0.02, ema_decay=0.99),
        train=dict(
            steps=1000, global_batch=128, label_drop=0.1, precision="fp32", log_every=20, checkpoint_every=500, keep_last=2
        ),
        sample=dict(sampler="euler_maruyama", steps=25, guidance=1.5, batch=500),
    ),
}


def recipe(name: str) -> dict[str, Any]:
    """The recipe's values. Raises UsageError that lists the known names."""
    try:
        return merge({}, RECIPES[name])
    except KeyError:
        raise UsageError(f"no recipe {name!r}; there are: {', '.join(RECIPES)}") from None


def model_values(name: str) -> dict[str, Any]:
    """The model's sizes. Raises UsageError that lists the known names."""
    try:
        return dict(MODELS[name])
    except KeyError:
        raise UsageError(f"no model {name!r}; there are: {', '.join(MODELS)}") from None


def recipe_config(name: str) -> Config:
    return Config.from_dict(recipe(name))
