"""An explicit key/value cache for sampling entity by entity."""

from typing import NamedTuple

from torch import Tensor


class LayerCache(NamedTuple):
    """Keys and values (B, N, T, H) of one layer, each at the position of its token.

    A step writes the tokens fed and attends to everything before them. Each step overwrites the current entity, so the cache
    needs no commit: earlier positions hold what was written there last.
    """

    keys: Tensor
    values: Tensor

    def update(self, start: int, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write tokens from position ``start`` on. Returns views of the keys and values of all tokens up to their end.

        A batch smaller than the cache uses its first sequences.
        """
        batch, end = k_BNTH.shape[0], start + k_BNTH.shape[2]
        self.keys[:batch, :, start:end] = k_BNTH
        self.values[:batch, :, start:end] = v_BNTH
        return self.keys[:batch, :, :end], self.values[:batch, :, :end]


KVCache = list[LayerCache]  # one per layer
