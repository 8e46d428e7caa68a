"""Images from a checkpoint: labels in, uint8 images out, and the labelled grid a person looks at."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from xar_scale.checkpoint.store import FOLDER, Checkpoint, Report, load_weights, newest_valid, verify
from xar_scale.config import Config, SampleConfig
from xar_scale.errors import UsageError
from xar_scale.model.xar import XAR
from xar_scale.sampler import sample
from xar_scale.tokenizers import create_tokenizer


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's folder, or a run's: its newest valid checkpoint. Raises UsageError when there is none."""
    if not (path / FOLDER).is_dir():
        return verify(path)
    if (checkpoint := newest_valid(path, Report())) is None:
        raise UsageError(f"no checkpoint in {path}")
    return checkpoint


def generate(checkpoint: Checkpoint, labels: list[int], settings: SampleConfig, seed: int, device: torch.device) -> np.ndarray:
    """uint8 images (N, I, H, W), one a label, from the averaged weights. Image i depends on (seed, i) and its label only."""
    manifest = checkpoint.manifest
    config = Config.from_dict(manifest.config)
    if wrong := [label for label in labels if not 0 <= label < config.model.classes]:
        raise UsageError(f"class {wrong[0]} is outside 0..{config.model.classes - 1}")
    model = XAR(config.model)
    model.load_state_dict(load_weights(checkpoint, "ema"))
    model.to(device)
    tokenizer = create_tokenizer(**manifest.dataset["tokenizer"])
    images = []
    for first in range(0, len(labels), settings.batch):
        part = labels[first : first + settings.batch]
        options = dataclasses.asdict(settings)
        del options["batch"]
        latents = sample(model, part, seed=seed, first_image=first, **options)
        images.append(tokenizer.decode(latents / manifest.dataset["latent_scale"]))
    return np.concatenate(images)


def draw_grid(images: np.ndarray, labels: list[int], columns: int, path: Path, cell: int = 48) -> None:
    """A PNG with a row a class, its label before it, and at most ``columns`` images of it, each ``cell`` pixels wide."""
    gap, margin = 4, 40
    rows = sorted(set(labels))
    size = (margin + columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap)
    sheet = Image.new("L" if images.shape[1] == 1 else "RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=cell // 2)
    for row, label in enumerate(rows):
        top = gap + row * (cell + gap)
        pen.text((margin // 2, top + cell // 2), str(label), fill="black", font=font, anchor="mm")
        members = [image for image, of in zip(images, labels, strict=True) if of == label][:columns]
        for column, image in enumerate(members):
            pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
            tile = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.BICUBIC)
            sheet.paste(tile, (margin + column * (cell + gap), top))
    sheet.save(path)
