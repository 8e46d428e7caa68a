"""The pixel tokenizer: a token is a patch of pixels, exactly. For demos and tests without an autoencoder."""

from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import DTypeLike
from torch import Tensor

from xar_scale.errors import ConfigError, DataError
from xar_scale.tokenizers.levels import from_levels, to_levels


class PixelTokenizer:
    """Patches of ``patch`` x ``patch`` pixels become channels, levels 0..255 become -1..1.

    Exact: half a level is 4e-3, and float16 stores values up to 1 to within 5e-4, so decoding rounds to the encoded image.
    """

    name = "pixel"
    latent_scale = 1.0
    stored: Literal["latents", "moments"] = "latents"

    def __init__(self, patch: int = 2, image_channels: int = 1) -> None:
        if not all(type(number) is int and number > 0 for number in (patch, image_channels)):
            raise DataError(f"tokenizer pixel: patch {patch!r} and image_channels {image_channels!r} must be positive integers")
        self.patch, self.image_channels = patch, image_channels

    @property
    def settings(self) -> dict[str, Any]:
        return {"patch": self.patch, "image_channels": self.image_channels}

    def encode(self, images_BIHW: np.ndarray, dtype: DTypeLike = np.float16, *, strict: bool = True) -> np.ndarray:
        """uint8 images (B, I, H, W) -> latents (B, I * patch^2, H / patch, W / patch); any ``dtype`` holds them."""
        b, i, h, w = images_BIHW.shape
        p = self.patch
        if h % p or w % p or i != self.image_channels:
            raise ConfigError(
                f"images of {i} channels and {h}x{w} pixels do not fit the pixel tokenizer's {self.image_channels} "
                f"channels and {p}x{p} patches"
            )
        patches = from_levels(images_BIHW).reshape(b, i, h // p, p, w // p, p).transpose(0, 1, 3, 5, 2, 4)
        return np.ascontiguousarray(patches.reshape(b, i * p * p, h // p, w // p), dtype=dtype)

    def decode(self, latents_BCHW: Tensor) -> np.ndarray:
        """Latents -> uint8 images, rounded to the nearest level and clipped."""
        return to_levels(F.pixel_shuffle(latents_BCHW.float(), self.patch))
