"""Images from a checkpoint: labels in, uint8 images out, and the labelled grid a person looks at."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import FOLDER, Checkpoint, newest_valid, verify
from xar_scale.config import Config, KernelConfig, SampleConfig
from xar_scale.dist import say
from xar_scale.errors import UsageError
from xar_scale.model.xar import XAR
from xar_scale.sampler import sample
from xar_scale.tokenizers import create_tokenizer


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's folder, or a run's: its newest valid one. Raises UsageError when there is none that knows its run."""
    checkpoint = newest_valid(path) if (path / FOLDER).is_dir() else verify(path)
    if checkpoint is None:
        raise UsageError(f"no checkpoint in {path}")
    if not checkpoint.manifest.config:
        raise UsageError(
            f"{checkpoint.path} was made of another format, and knows neither its model's config nor its tokenizer"
        )
    return checkpoint


def generate(
    checkpoint: Checkpoint,
    labels: list[int],
    settings: SampleConfig,
    seed: int,
    device: torch.device,
    kernels: KernelConfig | None = None,
) -> np.ndarray:
    """uint8 images (N, I, H, W), one a label, from the averaged weights. Image i depends on (seed, i) and its label only."""
    manifest = checkpoint.manifest
    config = Config.from_dict(manifest.config)
    if wrong := [label for label in labels if not 0 <= label < config.model.classes]:
        raise UsageError(f"class {wrong[0]} is outside 0..{config.model.classes - 1}")
    tokenizer = create_tokenizer(manifest.dataset["tokenizer"], settings.tokenizer_weights, device)
    model = XAR(config.model)
    model.load_state_dict(load_weights(checkpoint, "ema"))
    model.to(device)
    used = model.use_kernels(kernels or KernelConfig(), device, model.in_proj.weight.dtype, training=False)
    say(f"{len(labels)} images on {device.type}; {used}")
    images = []
    for first in range(0, len(labels), settings.batch):
        part = labels[first : first + settings.batch]
        options = dataclasses.asdict(settings)
        del options["batch"], options["tokenizer_weights"]
        latents = sample(model, part, seed=seed, first_image=first, **options)
        images.append(tokenizer.decode(latents / manifest.dataset["latent_scale"]))
    return np.concatenate(images)


def draw_grid(rows: dict[str, np.ndarray], path: Path, cell: int = 48) -> None:
    """A PNG with a named row for each entry: its images (N, I, H, W), uint8, side by side, each ``cell`` pixels wide."""
    gap, font = 4, ImageFont.load_default(size=cell // 2)
    margin = int(max(font.getlength(name) for name in rows)) + cell // 2
    columns = max(len(images) for images in rows.values())
    grey = all(images.shape[1] == 1 for images in rows.values())
    size = (margin + columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap)
    sheet = Image.new("L" if grey else "RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        top = gap + row * (cell + gap)
        pen.text((margin // 2, top + cell // 2), name, fill="black", font=font, anchor="mm")
        for column, image in enumerate(images):
            pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
            tile = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(tile, (margin + column * (cell + gap), top))
    sheet.save(path)
