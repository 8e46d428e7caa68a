"""Convert pixel levels 0..255 to values -1..1, and back."""

import numpy as np
from torch import Tensor

from xar_scale.errors import NonFiniteError


def from_levels(images_BIHW: np.ndarray) -> np.ndarray:
    """uint8 images -> float32 values in -1..1, in C order."""
    # C order whatever the memory layout of the images: kernels differ with it, in the last bits
    return images_BIHW.astype(np.float32, order="C") / 127.5 - 1


def to_levels(values_BIHW: Tensor) -> np.ndarray:
    """Values -> uint8 images, rounded to the nearest level and clipped.

    Raises NonFiniteError for values that are not finite, which the conversion would silently turn into levels.
    """
    lost = (~values_BIHW.isfinite()).flatten(1).any(1)
    if count := int(lost.sum()):
        raise NonFiniteError(f"{count} of {len(lost)} images are NaN or infinite: the latents or the weights are broken")
    return ((values_BIHW.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
