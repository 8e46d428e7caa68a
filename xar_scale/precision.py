"""What bf16, fp16, tf32 and fp32 mean, in one table. Weights, Adam moments and EMA weights are float32 in all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Precision:
    """One mode. The attention backend follows from ``compute`` (model.attention.choose_backend)."""

    compute: torch.dtype  # of Linear layers and attention, under autocast
    gather: torch.dtype  # in which blocks' weights are all-gathered (FSDP2, ZeRO-3)
    reduce: torch.dtype  # in which gradients are reduced; ZeRO uses one dtype for both, ``gather``
    matmul: str  # torch.set_float32_matmul_precision: "highest" is IEEE float32, "high" is TF32 where the device has it
    scaled: bool  # whether gradients need a loss scale, without which they would vanish
    fallback: str | None  # the mode in which the guard retries a step that fails in this one


MODES = {
    #                 compute gather reduce  matmul    scaled  fallback
    "bf16": Precision(BF16,   BF16,  FP32,   "high",    False, "tf32"),
    "fp16": Precision(FP16,   FP16,  FP32,   "high",    True,  "tf32"),
    "tf32": Precision(FP32,   FP32,  FP32,   "high",    False, None),
    "fp32": Precision(FP32,   FP32,  FP32,   "highest", False, None),
}  # fmt: skip


def autocast(device: torch.device, compute: torch.dtype) -> torch.autocast:
    """A context that computes in ``compute`` what autocast lowers: Linear layers and attention."""
    return torch.autocast(device.type, dtype=compute, enabled=compute is not FP32)


@contextmanager
def matmul_mode(mode: str) -> Iterator[None]:
    """A context with the float32 matmul mode of ``mode``, whatever the process uses outside."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    apply_matmul_mode(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def apply_matmul_mode(mode: str) -> None:
    """Set this process's float32 matmul mode, and that of convolutions: cuDNN's default is TF32."""
    torch.set_float32_matmul_precision(MODES[mode].matmul)
    torch.backends.cudnn.allow_tf32 = MODES[mode].matmul == "high"
