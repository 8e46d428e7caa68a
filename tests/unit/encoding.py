"""Shared by the encoding tests: images, a tokenizer that can be stopped, ranks."""

import io
import shutil
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from xar_scale.data.encode import EncodeSettings, Reporter, encode_set
from xar_scale.data.images import center_crop
from xar_scale.tokenizers.pixel import PixelTokenizer

SIZE, CLASSES, PER_CLASS = 8, 3, 7
PIXEL = PixelTokenizer(patch=2, image_channels=3)
BAD = ("n0/i06.jpg", "n1/i13.jpg", "n2/i02.jpg")


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    smooth(8, 8, seed).save(file, "PNG")
    return file.getvalue()


def tars(folder, labels, *, member="jpg", key="s{:02d}", per_tar=3):
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(f"{folder}/part-%02d.tar", maxcount=per_tar, verbose=0) as writer:
        for number, label in enumerate(labels):
            own = {member: png(number), "cls": str(label), "json": b"{}"}
            writer.write({"__key__": key.format(number), **own})
    return folder


class Told(Reporter):
    def __init__(self):
        self.lines, self.steps = [], []

    def log(self, line):
        self.lines.append(line)

    def progress(self, *numbers):
        self.steps.append(numbers)


def settings_of(source, **changes) -> EncodeSettings:
    values = {
        "source": str(source),
        "tokenizer": {"name": PIXEL.name, **PIXEL.settings},
        "size": SIZE,
        "dtype": "float16",
        "flipped": True,
        "precision": "fp32",
        "batch": 2,
        "samples_per_shard": 5,
        "classes": None,
        "image": "jpg",
    }
    return EncodeSettings(**(values | changes))


def encode(out, source, using=PIXEL, *, workers=0, max_bad=0, reporter=None, **changes):
    reporter = Told() if reporter is None else reporter
    return encode_set(out, settings_of(source, **changes), using, workers=workers, max_bad=max_bad, reporter=reporter)


def as_rank(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(source: Path, to: Path, *names: str) -> Path:
    """Copy the source, with the named images truncated."""
    shutil.copytree(source, to)
    for name in names:
        content = (to / name).read_bytes()
        (to / name).write_bytes(content[: len(content) // 2])
    return to


class StopError(Exception):
    """Raised where a test stops the work."""


def stop(*_):
    raise StopError


class Stopping:
    """The pixel tokenizer until it has encoded ``passes`` batches, the blank image aside."""

    def __init__(self, passes):
        self.left, self.error = passes + 1, StopError()

    def __getattr__(self, name):
        return getattr(PIXEL, name)

    def encode(self, images, dtype, *, strict):
        if not self.left:
            raise self.error
        self.left -= 1
        return PIXEL.encode(images, dtype, strict=strict)


def cropped(source, key: str) -> np.ndarray:
    with Image.open(source / f"{key.replace('-', '/')}.jpg") as image:
        return np.asarray(center_crop(image.convert("RGB"), SIZE)).transpose(2, 0, 1)[None]


def make_tree(root: Path) -> None:
    """Write smooth images of many sizes, one folder per class."""
    for number in range(CLASSES * PER_CLASS):
        folder = root / f"n{number % CLASSES}"
        folder.mkdir(exist_ok=True)
        smooth(20 + number, 33 - number, number).save(folder / f"i{number:02d}.jpg")
