"""Images to encode: listing those of a folder, with labels and keys, and loading pixels with ADM's crop."""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from xar_scale.data.index import LABEL, Members, index_tar
from xar_scale.data.shards import MAX_KEY
from xar_scale.errors import DataError, UsageError

CROP = "adm-center"  # the name of ``center_crop`` in the set's record
# PIL reads more formats, some by starting other programs. The suffix is not used: ImageNet has PNGs named .JPEG
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MOST_PIXELS = 1 << 26  # of a resized image, before the crop: 200 MB
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class SourceImage(NamedTuple):
    """One image of a source: a file, or ``size`` bytes of a tar starting at ``begin``."""

    path: str  # of the file or the tar, relative to the source
    label: int
    key: str  # in the data set
    member: str = ""  # the sample's key in the tar
    begin: int = 0
    size: int = -1  # the whole file

    @property
    def name(self) -> str:
        return f"{self.path}, sample {self.member}" if self.member else self.path


def list_images(source: Path, member: str, classes: int | None) -> tuple[list[SourceImage], int]:
    """Return the images of ``source``, in an order that depends on names alone, and the number of classes.

    ``source`` is a tree with one folder per class (labels number them in alphabetical order, as torchvision's ImageFolder
    does; images may lie in subfolders), or a folder of WebDataset tars whose samples have an image ``member`` and a label,
    cls. Raises UsageError if it is both, or if tars come without ``classes``; DataError, naming the file, for anything that
    would shift labels, merge samples or silently lose some.
    """
    tars = sorted(path.name for path in source.glob("*.tar"))
    folders = sorted(path.name for path in source.iterdir() if path.is_dir())
    if tars and folders:
        raise UsageError(f"{source} contains both tars ({tars[0]}) and folders ({folders[0]}): keep one kind of source")
    if tars:
        if classes is None:
            raise UsageError(f"{source} contains tars, which do not give the number of classes: set --classes")
        images = list(_in_tars(source, tars, member))
    else:
        classes = max(len(folders), 1) if classes is None else classes
        images = list(_in_tree(source, folders))
    if outside := next((image for image in images if image.label >= classes), None):
        raise DataError(f"{source / outside.name}: label {outside.label} is outside 0..{classes - 1}")
    return _with_keys(source, images), classes


def _in_tree(source: Path, folders: Sequence[str]) -> Iterator[SourceImage]:
    if stray := sorted(path.name for path in source.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()):
        raise DataError(f"{source / stray[0]} is not in a class folder")
    if not folders:
        raise DataError(f"{source} contains neither tars nor class folders")
    for label, folder in enumerate(folders):
        found = sorted(
            os.path.relpath(os.path.join(at, name), source)
            for at, _, names in os.walk(source / folder, onerror=_refuse, followlinks=True)
            for name in names
            if os.path.splitext(name)[1].lower() in SUFFIXES
        )
        if not found:
            raise DataError(
                f"{source / folder} contains no image ({' '.join(SUFFIXES)}), so it is not a class: "
                "the labels after it would shift"
            )
        yield from (SourceImage(path, label, os.path.splitext(path)[0]) for path in found)


def _refuse(error: OSError) -> None:
    raise error  # by default os.walk skips what it cannot read


def _in_tars(source: Path, tars: Sequence[str], member: str) -> Iterator[SourceImage]:
    for name in tars:
        path = source / name
        with path.open("rb") as file:
            index = index_tar(file, str(path), Members(latent=member, label=LABEL), flipped=False, checksums=False)
        if not index.keys:
            raise DataError(f"shard {path} holds no samples with {member} and {LABEL}")
        for key, label, _, data, size, _ in index.rows():
            yield SourceImage(name, label, f"{name.removesuffix('.tar')}/{key}", key, data, size)


def _with_keys(source: Path, images: Sequence[SourceImage]) -> list[SourceImage]:
    """Return the images with their keys, which so far are paths, in the form that a data set uses."""
    found = dict[str, SourceImage]()
    for number, image in enumerate(images):
        key = image.key.replace("/", "-").replace(".", "_").encode(errors="replace")
        if len(key) > MAX_KEY:  # in bytes, as a tar header counts
            key = f"{number:08d}-".encode() + key[9 - MAX_KEY :]
        keyed = image._replace(key=key.decode(errors="ignore"))
        if (other := found.setdefault(keyed.key, keyed)) is not keyed:
            raise DataError(f"{source / other.name} and {source / image.name} would both have the key {keyed.key}")
    return list(found.values())


def load_image(source: Path, image: SourceImage, size: int, channels: int) -> np.ndarray:
    """Return uint8 (channels, size, size): RGB, or grey if ``channels`` is 1. Raises BadImageError with the reason.

    EXIF orientation is not applied: ADM and its successors do not apply it.
    """
    try:
        with open(source / image.path, "rb") as file:
            file.seek(image.begin)
            content = file.read(image.size)
    except OSError as error:
        raise BadImageError(str(error.strerror)) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # thousands about EXIF data and colour tables
            whole = Image.open(io.BytesIO(content), formats=FORMATS).convert("L" if channels == 1 else "RGB")
        cropped = np.asarray(center_crop(whole, size))
    except (BadImageError, MemoryError):  # the latter is the machine's fault, not the image's
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"is not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # torn bytes raise any of a dozen types
        raise BadImageError((str(error) or type(error).__name__).splitlines()[0]) from None
    return np.ascontiguousarray(cropped.reshape(size, size, channels).transpose(2, 0, 1))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop (Dhariwal and Nichol 2021, guided-diffusion's ImageDataset), which MAR's and xAR's latents were made with.

    Halve by a box filter while the shorter side stays at least ``size``, resize it to ``size`` by a bicubic filter, crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise BadImageError(f"{image.width}x{image.height} pixels would become {width}x{height} at a shorter side of {size}")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


class BadImageError(Exception):
    """Why one image cannot be used; the caller adds its name."""
