"""MAR's KL-16 autoencoder, which xAR is trained with: 16x16 pixels become a token of 16 channels.

The network is diffusers' AutoencoderKL, loaded from the published file by an explicit map of names.
"""

import hashlib
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from xar_scale.errors import ConfigError, DataError, UsageError
from xar_scale.tokenizers.levels import from_levels, to_levels

IMAGE_CHANNELS, LATENT_CHANNELS, PATCH = 3, 16, 16
MAX_LOG_VARIANCE, MIN_LOG_VARIANCE = 20.0, -30.0  # of the posterior; clamped before use

# Modules, published -> diffusers'; each has a weight and a bias
_TOP = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.norm_out": "encoder.conv_norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.norm_out": "decoder.conv_norm_out",
    "decoder.conv_out": "decoder.conv_out",
}
_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_WIDTHS = (128, 128, 256, 256, 512)  # channels at each level, finest first
_LAST = len(_WIDTHS) - 1
_CHANGE_WIDTH = ("encoder.down.2.block.0", "encoder.down.4.block.0", "decoder.up.3.block.0", "decoder.up.1.block.0")


def official_names() -> dict[str, str]:
    """Return the map of published to diffusers' parameter names, for every parameter."""
    names, resnets = dict(_TOP), dict[str, str]()
    attentions = {f"encoder.down.{_LAST}.attn.{n}": f"encoder.down_blocks.{_LAST}.attentions.{n}" for n in range(2)}
    for level in range(_LAST + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{_LAST - level}"  # diffusers counts in order of use
        resnets |= {f"encoder.down.{level}.block.{n}": f"{down}.resnets.{n}" for n in range(2)}
        resnets |= {f"decoder.up.{level}.block.{n}": f"{up}.resnets.{n}" for n in range(3)}
        if level < _LAST:
            names[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            names[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    for part in ("encoder", "decoder"):
        resnets |= {f"{part}.mid.block_{n + 1}": f"{part}.mid_block.resnets.{n}" for n in range(2)}
        attentions[f"{part}.mid.attn_1"] = f"{part}.mid_block.attentions.0"
    for blocks, inner in ((resnets, _RESNET), (attentions, _ATTENTION)):
        names |= {f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in blocks.items() for a, b in inner.items()}
    names |= {f"{theirs}.nin_shortcut": f"{resnets[theirs]}.conv_shortcut" for theirs in _CHANGE_WIDTH}
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in names.items() for kind in ("weight", "bias")}


def from_official(state: dict[Any, Any], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Return a published state dict with diffusers' names and ``shapes``, in float32.

    Entries of the training loss (``loss.*``) are dropped. Raises DataError naming an entry that is missing, unknown or of
    another shape.
    """
    names = official_names()
    given = {str(name): value for name, value in state.items() if not str(name).startswith("loss.")}
    if missing := sorted(set(names) - set(given)):
        raise DataError(f"kl16 weights lack {len(missing)} entries, first {missing[0]}")
    if unknown := sorted(set(given) - set(names)):
        raise DataError(f"kl16 weights hold {len(unknown)} unknown entries, first {unknown[0]}")
    for theirs, ours in names.items():
        # the published attention projects with 1x1 convolutions, diffusers' with the same values as matrices
        shape = (*shapes[ours], 1, 1) if len(shapes[ours]) == 2 else tuple(shapes[ours])
        found = tuple(given[theirs].shape) if isinstance(given[theirs], Tensor) else type(given[theirs]).__name__
        if found != shape:
            raise DataError(f"kl16 weights: {theirs} is {found}, the network has {shape}")
    return {ours: given[theirs].float().reshape(shapes[ours]) for theirs, ours in names.items()}


def _build(state: dict[Any, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL  # here, because importing it takes seconds

    with torch.device("meta"):
        network: torch.nn.Module = AutoencoderKL(
            in_channels=IMAGE_CHANNELS,
            out_channels=IMAGE_CHANNELS,
            latent_channels=LATENT_CHANNELS,
            block_out_channels=_WIDTHS,
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * _LAST + ["AttnDownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D"] * len(_WIDTHS),
        )
    shapes = {name: parameter.shape for name, parameter in network.state_dict().items()}
    network.load_state_dict(from_official(state, shapes), assign=True)
    return network.requires_grad_(False).eval()


def _read(content: bytes, path: Path) -> dict[Any, Any]:
    """Return the state dict in the bytes of a published file. Raises DataError naming the path if there is none."""
    try:
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # torn bytes raise any of a dozen types, and torch's message suggests unpickling objects after all
        raise DataError(f"{path} is not a plain weights file: torn, or it contains objects, which are not unpickled") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise DataError(f"{path} holds no state dict under 'model'")
    return values["model"]


class KL16Tokenizer:
    """The autoencoder on ``device``: by default in float32 and one image at a time.

    One at a time because kernels differ with the batch, in the last bits. So an image's stored moments, and a latent's
    decoded image, do not depend on the rest of the batch, and activations take the memory of one image.
    """

    name = "kl16"
    latent_scale = 0.2325  # as in the published training
    stored: Literal["latents", "moments"] = "moments"
    image_channels = IMAGE_CHANNELS

    def __init__(
        self,
        weights: str | Path,
        device: str | torch.device = "cpu",
        sha256: str | None = None,
        *,
        batch: int = 1,
        compute: torch.dtype = torch.float32,
    ) -> None:
        """``weights`` is the path of kl16.ckpt, which must have the SHA-256, if one is given.

        ``batch`` is the images per forward pass, ``compute`` float32 or, by autocast over float32 weights, bfloat16.
        Raises UsageError if there is no such file, DataError if it has another SHA-256 or is not the published network.
        """
        path = Path(weights)
        if not path.is_file():
            raise UsageError(f"no weights at {path}")
        content = path.read_bytes()
        self.sha256, self.device = hashlib.sha256(content).hexdigest(), torch.device(device)
        self.batch, self.compute = batch, compute
        if sha256 not in (None, self.sha256):
            raise DataError(
                f"{path} (sha256 {self.sha256:.12}...) does not hold the kl16 weights that made the latents "
                f"(sha256 {sha256!s:.12}...)"
            )
        self.network: Any = _build(_read(content, path)).to(device)

    @property
    def settings(self) -> dict[str, Any]:
        return {"sha256": self.sha256}

    @torch.no_grad()
    def moments(self, images_BIHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in -1..1 -> the posterior's mean, then its log variance (B, 32, H / 16, W / 16), float32."""
        return self._each(lambda image: self.network.quant_conv(self.network.encoder(image)), images_BIHW)

    @torch.no_grad()
    def reconstruct(self, latents_BCHW: Tensor) -> Tensor:
        """Unscaled latents (B, 16, H / 16, W / 16) -> images (B, 3, H, W) in about -1..1, float32."""
        return self._each(lambda latent: self.network.decode(latent).sample, latents_BCHW)

    def _each(self, network: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        mixed = self.compute != torch.float32
        with torch.autocast(self.device.type, self.compute) if mixed else nullcontext():
            return torch.cat([network(part.to(self.device, torch.float32)).float() for part in batch.split(self.batch)])

    def encode(self, images_BIHW: np.ndarray, dtype: DTypeLike = np.float16, *, strict: bool = True) -> np.ndarray:
        """uint8 images (B, 3, H, W) -> moments (B, 32, H / 16, W / 16): mean, and log variance within -30..20.

        Raises ConfigError for images of other sizes, DataError for a mean that ``dtype`` cannot hold; unless ``strict``, it is
        stored as infinite.
        """
        b, i, h, w = images_BIHW.shape
        if h % PATCH or w % PATCH or i != IMAGE_CHANNELS:
            raise ConfigError(
                f"images of {i} channels and {h}x{w} pixels do not fit the kl16 tokenizer's {IMAGE_CHANNELS} channels and "
                f"{PATCH}x{PATCH} patches"
            )
        mean, log_variance = self.moments(torch.from_numpy(from_levels(images_BIHW))).chunk(2, dim=1)
        moments = torch.cat([mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)], dim=1)
        stored = moments.to(getattr(torch, np.dtype(dtype).name))
        if strict and (lost := (~stored.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()):
            largest = moments[lost[0]].abs().max().item()
            raise DataError(f"image {lost[0]} of {b}: its moments reach {largest:g}, which {np.dtype(dtype)} cannot hold")
        return stored.cpu().numpy()

    def decode(self, latents_BCHW: Tensor) -> np.ndarray:
        """Unscaled latents (B, 16, H / 16, W / 16) -> uint8 images (B, 3, H, W), rounded and clipped as published."""
        channels = latents_BCHW.shape[1]
        if channels != LATENT_CHANNELS:
            raise ConfigError(f"latents of {channels} channels do not fit the kl16 tokenizer's {LATENT_CHANNELS}")
        return to_levels(self.reconstruct(latents_BCHW))
