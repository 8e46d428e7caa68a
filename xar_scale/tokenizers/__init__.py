"""Image tokenizers, by name: each turns uint8 images into what a shard stores and latents back into images."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from xar_scale.errors import DataError
from xar_scale.tokenizers.pixel import PixelTokenizer


class Tokenizer(Protocol):
    """``name`` and ``settings`` identify it in a data set's index; ``latent_scale`` brings stored latents to unit size."""

    name: str
    latent_scale: float

    @property
    def settings(self) -> dict[str, Any]: ...

    def encode(self, images_BIHW: np.ndarray) -> np.ndarray:
        """uint8 images (B, I, H, W) -> stored arrays (B, ..., rows, columns), float16."""

    def decode(self, latents_BCHW: Tensor) -> np.ndarray:
        """Latents (B, C, rows, columns), unscaled, -> uint8 images (B, I, H, W)."""


_TOKENIZERS = {"pixel": PixelTokenizer}


def create_tokenizer(name: str, **settings: Any) -> Tokenizer:
    """Raises DataError for a name or setting that this version does not know."""
    try:
        return _TOKENIZERS[name](**settings)
    except (KeyError, TypeError):
        raise DataError(f"no tokenizer {name!r} with settings {settings}; there are: {', '.join(_TOKENIZERS)}") from None
