"""Configs and devices of memory estimates."""

import torch

from tests.conftest import digits_config
from xar_scale.config import Config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GRID = ["model.channels=16", "model.grid=[16,16]"]
REDUCED_B = [*GRID, "model.width=768", "model.heads=12"]


def config_of(*overrides: str) -> Config:
    return digits_config("train.engine=single", *overrides)
