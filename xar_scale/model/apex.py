"""NVIDIA apex: whether its kernels can be had, and why not; its fused RMSNorm."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from xar_scale.config import KernelLibrary
from xar_scale.errors import ConfigError

EXTENSIONS = ("fused_layer_norm_cuda", "amp_C")


def choose_library(wanted: KernelLibrary, device: torch.device) -> KernelLibrary:
    """apex only where it is asked for: it has not been measured against torch's own fused kernels.

    Raises ConfigError with the reason when it is asked for and cannot be had.
    """
    if wanted != "apex":
        return "torch"
    if reason := _missing(device):
        raise ConfigError(f"kernels.library apex: {reason}; kernels.library=torch does without it")
    return "apex"


def _missing(device: torch.device) -> str | None:
    """Nothing is imported: what goes by the name of apex may be another package."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "it is not installed; NVIDIA's is built from its source, with CUDA extensions"
    folder = Path(next(iter(spec.submodule_search_locations or [spec.origin or ""])))
    if not (folder / "optimizers").is_dir():
        return (
            f"{folder} is not NVIDIA's apex, which has apex.optimizers, but another package of that name "
            "(pip install apex brings one); uninstall it and build NVIDIA's from its source"
        )
    if lacking := [name for name in EXTENSIONS if importlib.util.find_spec(name) is None]:
        return f"{folder} was built without its CUDA extension {lacking[0]}"
    if device.type != "cuda":
        return f"its kernels need a CUDA device, this is {device.type}"
    return None


def rms_norm(x: Tensor, width: int, eps: float) -> Tensor:
    """Over the last dimension, without weight; statistics in float32, the result of x's dtype."""
    from apex.normalization.fused_layer_norm import fused_rms_norm

    with torch.autocast(x.device.type, enabled=False):  # under it apex would round x before it takes the statistics
        return fused_rms_norm(x, (width,), eps)
