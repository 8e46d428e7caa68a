"""Grey levels 0..255 as -1..1, and back."""

import numpy as np
from torch import Tensor

from xar_scale.errors import NonFiniteError


def from_levels(images_BIHW: np.ndarray) -> np.ndarray:
    """uint8 images -> float32 values in -1..1, in C order."""
    # however the images lie in memory: kernels differ with it, in the last bits
    return images_BIHW.astype(np.float32, order="C") / 127.5 - 1


def to_levels(values_BIHW: Tensor) -> np.ndarray:
    """Values -> uint8 images, rounded to the nearest level and clipped.

    Raises NonFiniteError where one holds what is no number, of which a level would be made like any other.
    """
    lost = (~values_BIHW.isfinite()).flatten(1).any(1)
    if count := int(lost.sum()):
        raise NonFiniteError(f"{count} of {len(lost)} images are NaN or infinite: the latents or the weights are broken")
    return ((values_BIHW.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
