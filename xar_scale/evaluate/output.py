"""Images as files: a labelled grid, single PNGs, the npz of ADM's evaluator, an animation."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xar_scale.errors import UsageError
from xar_scale.files import write_atomically

SMALLEST, LARGEST = 48, 256  # pixels of a picture's side in a grid


@dataclass(frozen=True)
class SampledImages:
    """Images uint8 (N, I, H, W), each of a class and a seed; titles by class; the first one's states, where they are kept."""

    images: np.ndarray
    labels: Sequence[int]
    seeds: Sequence[int]
    titles: dict[int, str]
    frames: Sequence[np.ndarray]

    def write(self, path: Path) -> None:
        """As what the name says that it is."""
        if path.suffix == ".png":
            rows = {title: self.images[np.equal(self.labels, label)] for label, title in self.titles.items()}
            write_atomically(path, png_bytes(draw_grid(rows)))
        elif path.suffix == ".npz":
            # seed by seed: ADM's evaluator takes its score of 5,000 after 5,000 as they come, which must be of all classes
            order = np.argsort(self.seeds, kind="stable")
            write_npz(self.images[order], np.asarray(self.labels)[order], path)
        elif path.suffix == ".gif":
            write_animation(self.frames, path)
        else:
            path.mkdir(exist_ok=True)
            for image, label, seed in zip(self.images, self.labels, self.seeds, strict=True):
                write_atomically(path / f"class-{label:04d}-seed-{seed:06d}.png", png_bytes(to_pil(image)))


def check_output(path: Path) -> None:
    """Raises UsageError for a name of something that is not written."""
    written = path.suffix in (".png", ".npz", ".gif")
    if path.is_dir() if written else path.suffix and not path.is_dir():
        raise UsageError(f"--out {path} must be a .png, .npz or .gif file, or a folder without a suffix")
    if not written and path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is a file, not a folder")


def to_pil(image_IHW: np.ndarray) -> Image.Image:
    """Of uint8 (I, H, W), I 1 or 3."""
    return Image.fromarray(image_IHW[0] if image_IHW.shape[0] == 1 else image_IHW.transpose(1, 2, 0))


def draw_grid(rows: dict[str, np.ndarray], cell: int | None = None) -> Image.Image:
    """A named row for each entry: its images (N, I, H, W), uint8, side by side, each ``cell`` pixels wide (none: by their
    size)."""
    cell = cell or min(max(SMALLEST, *(images.shape[-1] for images in rows.values())), LARGEST)
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
            tile = _within(to_pil(image), cell, Image.Resampling.BICUBIC)
            sheet.paste(tile, (margin + column * (cell + gap), top))
    return sheet


def _within(picture: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    """As large as fits into a square."""
    scale = side / max(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), resampling)


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def write_npz(images_NIHW: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """As ADM's evaluator reads it: ``arr_0`` uint8 (N, H, W, 3), and ``arr_1``, the labels; grey ones repeated."""
    colour = np.repeat(images_NIHW, 3, axis=1) if images_NIHW.shape[1] == 1 else images_NIHW
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=colour.transpose(0, 2, 3, 1), arr_1=labels.astype(np.int64))
    write_atomically(path, buffer.getbuffer())


def write_animation(frames: Sequence[np.ndarray], path: Path, frame_ms: int = 80, last_ms: int = 2000) -> None:
    """Images (I, H, W) one after another as a GIF that begins anew after the last."""
    pictures = [to_pil(frame) for frame in frames]
    side = max(SMALLEST * 4, *pictures[0].size)
    larger = [_within(picture, side, Image.Resampling.NEAREST) for picture in pictures]
    buffer = io.BytesIO()
    durations = [frame_ms] * (len(larger) - 1) + [last_ms]
    larger[0].save(buffer, format="gif", save_all=True, append_images=larger[1:], duration=durations, loop=0)
    write_atomically(path, buffer.getvalue())
