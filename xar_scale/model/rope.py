"""Two-dimensional rotary position embedding: half of a head's channels rotate with the row, half with the column."""

import torch
from torch import Tensor

from xar_scale.model.cpu import in_graph

BASE = 10000.0


def rotary_angles(coordinates_T2: Tensor, head_width: int) -> Tensor:
    """Return angles (T, head_width / 2): position * BASE^(-2j / half) for each channel pair (2j, 2j + 1) of each half."""
    half = head_width // 2
    frequencies = BASE ** (-torch.arange(0, half, 2, dtype=torch.float32, device=coordinates_T2.device) / half)
    return (coordinates_T2[:, :, None] * frequencies).flatten(1)


def apply_rotary(x_BTSNH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotate each channel pair p of each token by its angle: x is (B, T, S, N, H), S of q and k; cos and sin are (T, H / 2)."""
    pairs = x_BTSNH.to(torch.promote_types(x_BTSNH.dtype, cos_TP.dtype)).unflatten(-1, (-1, 2))
    cos, sin = cos_TP[:, None, None], sin_TP[:, None, None]
    if in_graph():  # one fused kernel each way; stacking the pairs would add one, complex numbers do not fuse
        turned = pairs * cos[..., None] + pairs.flip(-1) * torch.stack((-sin, sin), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).type_as(x_BTSNH)
