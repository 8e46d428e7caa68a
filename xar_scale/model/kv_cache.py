"""An explicit key/value cache for sampling entity by entity."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, in the position of their token.

    A step writes the tokens it was fed and sees everything before them. The current entity is written anew at each step,
    so a cache needs no commit: what lies before the tokens fed is what was written there last.
    """

    def __init__(
        self, layers: int, batch: int, heads: int, tokens: int, head_width: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (layers, batch, heads, tokens, head_width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)

    def update(self, layer: int, start: int, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write tokens from position ``start`` on; return keys and values of all tokens up to their end (views)."""
        batch, end = k_BNTH.shape[0], start + k_BNTH.shape[2]
        self.keys[layer, :batch, :, start:end] = k_BNTH
        self.values[layer, :batch, :, start:end] = v_BNTH
        return self.keys[layer, :batch, :, :end], self.values[layer, :batch, :, :end]
