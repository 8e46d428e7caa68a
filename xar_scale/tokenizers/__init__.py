"""Image tokenizers, by name: each encodes uint8 images into what a shard stores, and decodes latents into images."""

import inspect
import json
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
    """``name`` and ``settings`` identify it in dataset.json; ``latent_scale`` scales stored latents to unit size."""

    name: str
    latent_scale: float
    stored: Literal["latents", "moments"]  # what ``encode`` returns
    image_channels: int  # I below

    @property
    def settings(self) -> dict[str, Any]: ...

    def encode(self, images_BIHW: np.ndarray, dtype: DTypeLike = np.float16, *, strict: bool = True) -> np.ndarray:
        """uint8 images (B, I, H, W) -> stored arrays (B, ..., rows, columns) of ``dtype``.

        Raises DataError for a value that ``dtype`` cannot hold; unless ``strict``, it is stored as a non-finite value.
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
    """Return the tokenizer that made a data set. ``description`` is its name and settings, as dataset.json stores them.

    For kl16, ``weights`` is the path of kl16.ckpt, refused unless it has the SHA-256 in the description; ``device``,
    ``batch`` (images per forward pass) and ``compute`` are for kl16 too. Raises DataError for a description that this version
    does not know, ConfigError if ``weights`` are missing, or given to a tokenizer that has none.
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
        raise DataError(f"no tokenizer {name!r} with settings {settings}; available: {', '.join(makers)}") from None
    if name != "kl16":
        if weights:
            raise ConfigError(f"sample.tokenizer_weights is {weights}, but tokenizer {name} has no weights")
    elif not weights:
        raise ConfigError("tokenizer kl16 needs its weights: set sample.tokenizer_weights to the path of kl16.ckpt")
    elif not settings.get("sha256"):
        raise DataError("the data set does not record which kl16 weights made it: its tokenizer has no sha256")
    return makers[name](**settings)


def parse_tokenizer(text: str) -> dict[str, Any]:
    """Return the name and settings in a tool's ``--tokenizer``. Raises UsageError if it is not JSON of them."""
    try:
        description = json.loads(text)
    except ValueError:
        raise UsageError(f"--tokenizer {text!r} is not JSON") from None
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise UsageError(f"--tokenizer {text!r} is not a JSON object with a name")
    return description


def check_origin(description: dict[str, Any], stored: str, channels: int) -> None:
    """Check that the latents of a new set, with ``stored`` arrays of ``channels``, can be decoded later.

    For kl16, raises UsageError if the description does not identify the weights, DataError for another number of channels.
    """
    if description.get("name") != KL16Tokenizer.name:
        return
    sha256 = description.get("sha256")
    if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise UsageError(f"tokenizer kl16: its weights' sha256 {sha256!r} is not 64 lower-case hexadecimal digits")
    made = 2 * LATENT_CHANNELS if stored == "moments" else LATENT_CHANNELS
    if channels != made:
        raise DataError(f"tokenizer kl16: its {stored} have {made} channels, not {channels}")
