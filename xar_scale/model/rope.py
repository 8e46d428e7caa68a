"""Two-dimensional rotary position embedding: half of a head's channels turn with the row, half with the column."""

import torch
from torch import Tensor

BASE = 10000.0


def rotary_angles(coordinates_T2: Tensor, head_width: int) -> Tensor:
    """Angles (T, head_width / 2): of each neighbouring channel pair (2j, 2j + 1) of each half, position * BASE^(-2j / half)."""
    half = head_width // 2
    frequencies = BASE ** (-torch.arange(0, half, 2, dtype=torch.float32, device=coordinates_T2.device) / half)
    return (coordinates_T2[:, :, None] * frequencies).flatten(1)


def apply_rotary(x_BNTH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Turn each channel pair p of each token by its angle; cos and sin are (T, H / 2)."""
    even, odd = x_BNTH.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos_TP - odd * sin_TP, even * sin_TP + odd * cos_TP), dim=-1)
    return turned.flatten(-2).type_as(x_BNTH)
