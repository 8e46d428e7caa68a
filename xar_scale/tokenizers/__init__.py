"""Image tokenizers, by name: each turns uint8 images into what a shard stores and latents back into images."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from xar_scale.errors import ConfigError, DataError
from xar_scale.tokenizers.kl16 import KL16Tokenizer
from xar_scale.tokenizers.pixel import PixelTokenizer


class Tokenizer(Protocol):
    """``name`` and ``settings`` identify it in a data set's index; ``latent_scale`` brings stored latents to unit size."""

    name: str
    latent_scale: float
    stored: Literal["latents", "moments"]  # what ``encode`` returns
    image_channels: int  # I below

    @property
    def settings(self) -> dict[str, Any]: ...

    def encode(self, images_BIHW: np.ndarray, dtype: DTypeLike = np.float16, *, strict: bool = True) -> np.ndarray:
        """uint8 images (B, I, H, W) -> stored arrays (B, ..., rows, columns) of ``dtype``.

        Raises DataError for a value that ``dtype`` cannot hold; where not ``strict``, it is stored as not finite.
        """

    def decode(self, latents_BCHW: Tensor) -> np.ndarray:
        """Latents (B, C, rows, columns), unscaled, -> uint8 images (B, I, H, W)."""


def create_tokenizer(
    description: dict[str, Any],
    weights: str | Path = "",
    device: str | torch.device = "cpu",
    *,
    batch: int = 1,
    compute: torch.dtype = torch.float32,
) -> Tokenizer:
    """The tokenizer that made a data set. ``description`` is its name and settings, as the set's index holds them.

    ``weights`` is the path of kl16.ckpt where the set is kl16's; one that does not have the SHA-256 in the description is
    refused; ``device``, ``batch`` (images a pass) and ``compute`` are its too. Raises DataError for a description that this
    version does not know, ConfigError where ``weights`` are missing, or given to a tokenizer that has none.
    """
    settings = dict(description)
    name = settings.pop("name", None)

    def kl16(sha256: str | None = None) -> Tokenizer:
        return KL16Tokenizer(weights, device, sha256, batch=batch, compute=compute)

    makers: dict[Any, Callable[..., Tokenizer]] = {"pixel": PixelTokenizer, "kl16": kl16}
    if name == "synthetic":
        raise ConfigError("latents of data.path=synthetic are noise, and no pictures: there is nothing to draw")
    try:
        inspect.signature(makers[name]).bind(**settings)
    except (KeyError, TypeError):
        raise DataError(f"no tokenizer {name!r} with settings {settings}; there are: {', '.join(makers)}") from None
    if name != "kl16":
        if weights:
            raise ConfigError(f"sample.tokenizer_weights is {weights}, but tokenizer {name} has no weights")
    elif not weights:
        raise ConfigError("tokenizer kl16 needs its weights: sample.tokenizer_weights is the path of kl16.ckpt")
    elif not settings.get("sha256"):
        raise DataError("the data set does not say which kl16 weights made it: its tokenizer has no sha256")
    return makers[name](**settings)
