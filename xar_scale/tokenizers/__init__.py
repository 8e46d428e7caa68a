"""Image tokenizers, by name: each turns uint8 images into what a shard stores and latents back into images."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from xar_scale.errors import ConfigError, DataError, UsageError
from xar_scale.tokenizers.kl16 import LATENT_CHANNELS, KL16Tokenizer
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
        raise ConfigError("latents of data.path=synthetic are noise: there are no images to decode")
    try:
        inspect.signature(makers[name]).bind(**settings)
    except (KeyError, TypeError):
        raise DataError(f"no tokenizer {name!r} with settings {settings}; there are: {', '.join(makers)}") from None
    if name != "kl16":
        if weights:
            raise ConfigError(f"sample.tokenizer_weights is {weights}, but tokenizer {name} has no weights")
    elif not weights:
        raise ConfigError("tokenizer kl16 needs its weights: set sample.tokenizer_weights to the path of kl16.ckpt")
    elif not settings.get("sha256"):
        raise DataError("the data set does not record which kl16 weights made it: its tokenizer has no sha256")
    return makers[name](**settings)


def check_origin(description: dict[str, Any], stored: str, channels: int) -> None:
    """Whether a set that is to be made can be drawn from again: one of ``stored`` arrays of ``channels``.

    Raises UsageError where it is kl16's and does not say of which weights, DataError for channels that kl16 has not.
    """
    if description.get("name") != KL16Tokenizer.name:
        return
    sha256 = description.get("sha256")
    if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise UsageError(f"tokenizer kl16: its weights' sha256 {sha256!r} is not 64 lower-case hexadecimal digits")
    made = 2 * LATENT_CHANNELS if stored == "moments" else LATENT_CHANNELS
    if channels != made:
        raise DataError(f"tokenizer kl16: its {stored} have {made} channels, not {channels}")
