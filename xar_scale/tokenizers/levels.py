"""Grey levels 0..255 as -1..1, and back."""

import numpy as np
from torch import Tensor


def from_levels(images_BIHW: np.ndarray) -> np.ndarray:
    """uint8 images -> float32 values in -1..1, in C order."""
    # however the images lie in memory: kernels differ with it, in the last bits
    return images_BIHW.astype(np.float32, order="C") / 127.5 - 1


def to_levels(values_BIHW: Tensor) -> np.ndarray:
    """Values -> uint8 images, rounded to the nearest level and clipped."""
    return ((values_BIHW.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
