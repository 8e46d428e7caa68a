"""An explicit key/value cache for sampling entity by entity."""

from typing import NamedTuple

from torch import Tensor


class LayerCache(NamedTuple):
    """Keys and values (B, N, T, H) of one layer, each in the position of its token.

    A step writes the tokens it was fed and sees everything before them. The current entity is written anew at each step,
    so a cache needs no commit: what lies before the tokens fed is what was written there last.
    """

    keys: Tensor
    values: Tensor

    def update(self, start: int, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write tokens from position ``start`` on; return keys and values of all tokens up to their end (views).

        Fewer sequences than the cache holds are its first ones.
        """
        batch, end = k_BNTH.shape[0], start + k_BNTH.shape[2]
        self.keys[:batch, :, start:end] = k_BNTH
        self.values[:batch, :, start:end] = v_BNTH
        return self.keys[:batch, :, :end], self.values[:batch, :, :end]


KVCache = list[LayerCache]  # one a layer
