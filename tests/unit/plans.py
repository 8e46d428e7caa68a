"""Configs and machines that are planned."""

from xar_scale.config import Config, merge, override
from xar_scale.plan.hardware import GPUS, Machines
from xar_scale.presets import model_values, recipe

H100 = Machines(GPUS["h100"], 16, 8)


def config(*overrides: str, model: str = "nano") -> Config:
    return Config.from_dict(override(merge(recipe("imagenet256_h"), {"model": model_values(model)}), list(overrides)))


FEW = ("train.global_batch=8", "data.lanes=8")  # few batch sizes, as each is measured
