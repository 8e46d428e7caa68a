"""One table of models and recipes, published or tried, as plain config values."""

import copy
from typing import Any

from xar_scale.errors import UsageError

MODELS: dict[str, dict[str, Any]] = {
    # name      width  blocks each  heads
    "nano": dict(width=128, depth_encoder=2, depth_decoder=2, heads=4),
    "xar_b": dict(width=768, depth_encoder=8, depth_decoder=8, heads=12),
    "xar_l": dict(width=1024, depth_encoder=16, depth_decoder=16, heads=16),
    "xar_h": dict(width=1280, depth_encoder=20, depth_decoder=20, heads=16),
    # larger than the published models: head width 128
    "xar_2b": dict(width=1792, depth_encoder=18, depth_decoder=18, heads=14),
    "xar_4b": dict(width=2048, depth_encoder=24, depth_decoder=24, heads=16),
    "xar_7b": dict(width=2560, depth_encoder=30, depth_decoder=30, heads=20),
}

IMAGENET_IMAGES = 1_281_167  # in the training set
_IMAGENET_STEPS_AN_EPOCH = IMAGENET_IMAGES / 2048


def _imagenet256(model: str, steps: int, guidance: float) -> dict[str, Any]:
    """The published recipe at 256 px on KL-16 latents: 800 epochs, learning rate 5e-5 per 256 images, constant to epoch 600."""
    return dict(
        model=dict(MODELS[model], channels=16, grid=[16, 16], classes=1000, dropout=0.1),
        data=dict(workers=8, lanes=128, window=2048, flip=True),
        optim=dict(
            lr=5e-5 * 2048 / 256,
            final_lr=1e-5,
            warmup_steps=round(100 * _IMAGENET_STEPS_AN_EPOCH),
            decay_share=0.25,
            betas=[0.9, 0.96],
            weight_decay=0.02,
            clip=1.0,
            ema_decay=0.9999,
        ),
        train=dict(steps=round(800 * _IMAGENET_STEPS_AN_EPOCH), global_batch=2048, label_drop=0.1, precision="bf16"),
        sample=dict(sampler="euler_maruyama", steps=steps, guidance=guidance),
    )


RECIPES: dict[str, dict[str, Any]] = {
    # scikit-learn's 8x8 digits as a 4x4 grid of 2x2-pixel tokens: three minutes on two CPU cores
    "digits": dict(
        model=dict(MODELS["nano"], channels=4, grid=[4, 4], classes=10),
        data=dict(path="runs/demo/data", workers=1, lanes=8),
        optim=dict(lr=3e-3, warmup_steps=50, decay_share=0.5, weight_decay=0.02, ema_decay=0.99),
        train=dict(
            steps=700, global_batch=128, label_drop=0.1, precision="fp32", log_every=20, checkpoint_every=350, keep_last=2
        ),
        sample=dict(sampler="euler_maruyama", steps=25, guidance=1.5, batch=500),
    ),
    "imagenet256_b": _imagenet256("xar_b", steps=40, guidance=2.7),
    "imagenet256_l": _imagenet256("xar_l", steps=50, guidance=2.3),
    "imagenet256_h": _imagenet256("xar_h", steps=50, guidance=2.2),
}


def recipe(name: str) -> dict[str, Any]:
    """Return a copy of the recipe's values. Raises UsageError that lists the known names."""
    try:
        return copy.deepcopy(RECIPES[name])
    except KeyError:
        raise UsageError(f"no recipe {name!r}; available: {', '.join(RECIPES)}") from None


def model_values(name: str) -> dict[str, Any]:
    """Return a copy of the model's sizes. Raises UsageError that lists the known names."""
    try:
        return dict(MODELS[name])
    except KeyError:
        raise UsageError(f"no model {name!r}; available: {', '.join(MODELS)}") from None
