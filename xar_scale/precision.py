"""What bf16, tf32 and fp32 mean: the dtype of matrix products and communication, and the matmul mode. Weights are fp32."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    compute: torch.dtype  # of Linear layers and attention, and of ZeRO's communication of their parameters
    matmul: str  # torch.set_float32_matmul_precision: "highest" is IEEE float32, "high" is TF32 where the device has it


MODES = {
    "bf16": Precision(torch.bfloat16, "high"),
    "tf32": Precision(torch.float32, "high"),
    "fp32": Precision(torch.float32, "highest"),
}


def apply_matmul_mode(mode: str) -> None:
    """Set this process's float32 matmul mode, and convolutions' with it: cuDNN's are TF32 unless told otherwise."""
    torch.set_float32_matmul_precision(MODES[mode].matmul)
    torch.backends.cudnn.allow_tf32 = MODES[mode].matmul == "high"
