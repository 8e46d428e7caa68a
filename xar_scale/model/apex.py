"""NVIDIA apex: whether its kernels are usable, and if not why; its fused RMSNorm."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from xar_scale.config import KernelLibrary
from xar_scale.errors import ConfigError

EXTENSIONS = ("fused_layer_norm_cuda", "amp_C")


def choose_library(wanted: KernelLibrary, device: torch.device) -> KernelLibrary:
    """Return "apex" only where it is named: it has not been measured against torch's own fused kernels.

    Raises ConfigError with the reason if it is named and not usable.
    """
    if wanted != "apex":
        return "torch"
    if unusable := why_unusable(device):
        raise ConfigError(f"kernels.library apex: {'; '.join(unusable)}; or use kernels.library=torch")
    return "apex"


def why_unusable(device: torch.device) -> list[str] | None:
    """Return why apex is not usable, then what to do about it; None if it is usable. Imports nothing."""
    if (folder := _installed()) is None:
        return ["not installed", "build NVIDIA's from source, with CUDA extensions"]
    if is_another_package():
        why = f"{folder} is not NVIDIA's apex, which has apex.optimizers, but another package of that name"
        return [f"{why} (pip install apex brings one)", "uninstall it and build NVIDIA's from source"]
    if lacking := [name for name in EXTENSIONS if importlib.util.find_spec(name) is None]:
        return [f"{folder} was built without its CUDA extension {lacking[0]}"]
    if device.type != "cuda":
        return [f"its kernels need a CUDA device, this is {device.type}"]
    return None


def is_another_package() -> bool:
    """Return whether the installed apex is not NVIDIA's."""
    folder = _installed()
    return folder is not None and not (folder / "optimizers").is_dir()


def _installed() -> Path | None:
    spec = importlib.util.find_spec("apex")
    return None if spec is None else Path(next(iter(spec.submodule_search_locations or [spec.origin or ""])))


def rms_norm(x: Tensor, width: int, eps: float) -> Tensor:
    """Return x normalised over the last dimension, without weight; statistics in float32, the result in x's dtype."""
    from apex.normalization.fused_layer_norm import fused_rms_norm

    with torch.autocast(x.device.type, enabled=False):  # under autocast apex would round x before taking the statistics
        return fused_rms_norm(x, (width,), eps)
