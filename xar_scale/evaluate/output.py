"""Write images to files: a labelled grid, single PNGs, an npz for ADM's evaluator, an animation."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xar_scale.errors import UsageError
from xar_scale.files import write_atomically

SMALLEST, LARGEST = 48, 256  # side of an image in a grid, in pixels
FRAME_MS, LAST_MS = 80, 2000  # how long an animation shows each frame, and the last one


@dataclass(frozen=True)
class SampledImages:
    """uint8 images (N, I, H, W) with a class and a seed each; titles by class; frames (I, H, W) of the first image, or none."""

    images: np.ndarray
    labels: Sequence[int]
    seeds: Sequence[int]
    titles: dict[int, str]
    frames: Sequence[np.ndarray]

    def write(self, path: Path) -> None:
        """Write the images in the format that the suffix names; without a suffix, one PNG each into a folder."""
        if path.suffix == ".png":
            rows = {title: self.images[np.equal(self.labels, label)] for label, title in self.titles.items()}
            write_atomically(path, png_bytes(draw_grid(rows)))
        elif path.suffix == ".npz":
            # seed by seed: ADM's evaluator scores 5,000 images after 5,000 in file order, and each should cover all classes
            order = np.argsort(self.seeds, kind="stable")
            write_npz(self.images[order], np.asarray(self.labels)[order], path)
        elif path.suffix == ".gif":
            write_animation(self.frames, path)
        else:
            path.mkdir(exist_ok=True)
            for image, label, seed in zip(self.images, self.labels, self.seeds, strict=True):
                write_atomically(path / f"class-{label:04d}-seed-{seed:06d}.png", png_bytes(to_pil(image)))


def check_output(path: Path) -> None:
    """Raises UsageError for a path that cannot be written to."""
    written = path.suffix in (".png", ".npz", ".gif")
    if path.is_dir() if written else path.suffix and not path.is_dir():
        raise UsageError(f"--out {path} must be a .png, .npz or .gif file, or a folder without a suffix")
    if not written and path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is a file, not a folder")


def to_pil(image_IHW: np.ndarray) -> Image.Image:
    """Convert uint8 (I, H, W), I 1 or 3."""
    return Image.fromarray(image_IHW[0] if image_IHW.shape[0] == 1 else image_IHW.transpose(1, 2, 0))


def draw_grid(rows: dict[str, np.ndarray]) -> Image.Image:
    """Return one titled row per entry: its uint8 images (N, I, H, W) side by side, each in a square as wide as the
    images, within SMALLEST to LARGEST pixels."""
    cell = min(max(SMALLEST, *(images.shape[-1] for images in rows.values())), LARGEST)
    gap, font = 4, ImageFont.load_default(size=min(cell // 2, 24))
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
            tile = _fit(to_pil(image), cell, Image.Resampling.BICUBIC)
            sheet.paste(tile, (margin + column * (cell + gap), top))
    return sheet


def _fit(image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    """Scale the image to the largest size that fits a square of ``side`` pixels."""
    scale = side / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), resampling)


def png_bytes(image: Image.Image, *, optimize: bool = False) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=optimize)
    return buffer.getvalue()


def write_npz(images_NIHW: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Write ADM's format: ``arr_0`` uint8 (N, H, W, 3), and the labels in ``arr_1``. Grey images get three equal channels."""
    colour = np.repeat(images_NIHW, 3, axis=1) if images_NIHW.shape[1] == 1 else images_NIHW
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=colour.transpose(0, 2, 3, 1), arr_1=labels.astype(np.int64))
    write_atomically(path, buffer.getbuffer())


def write_animation(frames: Sequence[np.ndarray], path: Path) -> None:
    """Write frames (I, H, W) as a looping GIF."""
    images = [to_pil(frame) for frame in frames]
    side = max(SMALLEST * 4, *images[0].size)
    larger = [_fit(image, side, Image.Resampling.NEAREST) for image in images]
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(larger) - 1) + [LAST_MS]
    larger[0].save(buffer, format="gif", save_all=True, append_images=larger[1:], duration=durations, loop=0)
    write_atomically(path, buffer.getvalue())
