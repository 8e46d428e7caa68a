"""Read sets of images, an npz or a folder of image files, in parts of fixed size."""

import math
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from xar_scale.data.images import FORMATS
from xar_scale.errors import DataError, UsageError, is_damage

T = TypeVar("T", "ImagesInMemory", "ImageFiles")
PART = 256  # images per part
MODES = ("1", "L", "P", "RGB")  # pillow's names of the image modes that are accepted
ZIP_LENGTHS = 26  # offset of the lengths of name and extra field in a local zip header
MOST_PIXELS = 1 << 22  # of an image: a part of such images takes 3 GB
EXPANDED, EXPANSION = 1 << 30, 20  # bytes and times to which only what was made to exhaust memory expands
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImagesInMemory:
    """``images`` uint8 (N, I, H, W); ``labels`` (N,), if known."""

    images: np.ndarray
    labels: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def parts(self) -> int:
        return -(-self.count // PART)

    def read(self, part: int) -> np.ndarray:
        return self.images[part * PART : (part + 1) * PART]


@dataclass(frozen=True)
class ImageFiles:
    """Image files of one ``size`` (W, H), in the order of their names."""

    paths: list[Path]
    size: tuple[int, int]
    labels: None = None

    @property
    def count(self) -> int:
        return len(self.paths)

    @property
    def parts(self) -> int:
        return -(-self.count // PART)

    def read(self, part: int) -> np.ndarray:
        """Return uint8 (N, 3, H, W). Raises DataError with the file that cannot be read, or has another mode or size."""
        images: list[np.ndarray] = []
        for path in self.paths[part * PART : (part + 1) * PART]:
            with _opened(path) as image:
                if image.size != self.size:
                    here, there = (f"{width}x{height}" for width, height in (image.size, self.size))
                    raise DataError(f"{path} is {here} pixels, {self.paths[0].name} is {there}: all must have the same size")
                images.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        return np.stack(images)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode not in MODES:
                raise DataError(f"{path} has mode {image.mode}, expected 8 bits per channel without transparency")
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{path} is {image.width}x{image.height} pixels, the most is {MOST_PIXELS:,} in all")
            image.load()
            yield image
    except Exception as error:
        if not is_damage(error):
            raise
        raise DataError(f"cannot read image {path}: {error}") from None


def open_images(path: Path) -> ImagesInMemory | ImageFiles:
    """Open an npz in ADM's format (``arr_0`` (N, H, W, 3), optionally labels in ``arr_1``), or the image files in a folder and
    its subfolders. Raises UsageError if there are no images, DataError if the file is something else."""
    if path.is_dir():
        os.listdir(path)  # raises OSError for an unreadable folder, in which the search would find nothing
        if not (paths := image_paths(path)):
            raise UsageError(f"no images in {path} ({', '.join(SUFFIXES)})")
        with _opened(paths[0]) as first:
            return _require_several(path, ImageFiles(paths, first.size))
    if not path.is_file():
        raise UsageError(f"no images at {path}")
    if "arr_0" not in npz_names(path):
        raise DataError(f"{path} has no images in arr_0")
    images, labels = _memory_map(path, "arr_0"), read_npz(path, "arr_1").get("arr_1")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not len(images):
        raise DataError(f"{path}: arr_0 is {images.dtype}{images.shape}, expected one or more uint8 (H, W, 3)")
    if labels is not None and labels.shape != images.shape[:1]:
        raise DataError(f"{path}: {labels.shape} labels for {len(images)} images")
    return _require_several(path, ImagesInMemory(images.transpose(0, 3, 1, 2), labels))


def image_paths(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _require_several(path: Path, images: T) -> T:
    if images.count < 2:
        raise UsageError(f"{path} holds one image: metrics need at least two")
    return images


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays. Raises DataError if the file is not an npz."""
    with _npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Return those arrays of ``names`` that the file has. Raises DataError if it is not an npz, or is torn."""
    with _npz(path) as archive:
        return {name: _read(archive, name) for name in names if f"{name}.npy" in archive.namelist()}


@contextmanager
def _npz(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.file_size > max(EXPANDED, EXPANSION * entry.compress_size):
                    raise DataError(
                        f"{path}: {entry.filename} would expand from {entry.compress_size:,} to {entry.file_size:,} bytes in "
                        "memory: store it uncompressed, as np.savez does"
                    )
            yield archive
    except Exception as error:
        if not is_damage(error):
            raise
        raise DataError(f"{path} is not an npz of arrays, or is torn") from None


class _Header(NamedTuple):
    """Of an array in an npz; ``size`` is its own."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    size: int


def _header(archive: zipfile.ZipFile, name: str) -> _Header:
    """Raises ValueError if the array is not as large as its header says: numpy would allocate that first."""
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        of_version = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        header = _Header(*of_version[np.lib.format.read_magic(file)](file), file.tell())
    if header.size + header.dtype.itemsize * math.prod(header.shape) != entry.file_size:
        raise ValueError
    return header


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    _header(archive, name)
    with archive.open(f"{name}.npy") as file:
        values: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return values


def _memory_map(path: Path, name: str) -> np.ndarray:
    """Return an array, memory-mapped if stored uncompressed: it may exceed memory, and a rank reads only what it needs."""
    with _npz(path) as archive:
        header, entry = _header(archive, name), archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED or header.fortran:
            return _read(archive, name)
        with path.open("rb") as file:
            file.seek(entry.header_offset + ZIP_LENGTHS)
            lengths = struct.unpack("<HH", file.read(4))  # of the name and the extra field, which precede the content
        offset = entry.header_offset + ZIP_LENGTHS + 4 + sum(lengths) + header.size
        return np.memmap(path, header.dtype, "r", offset, header.shape)
