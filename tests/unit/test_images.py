"""The images of a source, with labels and keys; ADM's crop; messages about bad images."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.unit.encoding import png, smooth, tars
from xar_scale.data.images import BadImageError, SourceImage, center_crop, list_images, load_image
from xar_scale.data.index import Members, index_tar
from xar_scale.data.shards import MAX_KEY
from xar_scale.errors import DataError, UsageError


def tree(root, *names: str):
    """Write a PNG at each of the paths, each with its own colours."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        smooth(8, 8, seed).save(root / name, "PNG")
    return root


# the crop


def resample(pixels: np.ndarray, side: int, kernel, support: float) -> np.ndarray:
    """The first axis at ``side`` samples, by a kernel as wide as the samples that it averages; in whole levels."""
    ratio = len(pixels) / side
    wide = max(ratio, 1)
    centers = (np.arange(side) + 0.5) * ratio
    offsets = (np.arange(len(pixels)) + 0.5 - centers[:, None]) / wide
    weights = np.where(np.abs(offsets) < support, kernel(np.abs(offsets)), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.floor(np.tensordot(weights, pixels, 1) + 0.5).clip(0, 255)


def resized(pixels: np.ndarray, size: tuple[int, int], kernel, support: float) -> np.ndarray:
    across = resample(pixels.swapaxes(0, 1), size[0], kernel, support).swapaxes(0, 1)
    return resample(across, size[1], kernel, support)


def box(x):
    return np.where(x < 0.5, 1.0, 0.0)


def bicubic(x):  # Keys 1981, a = -0.5
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)


@pytest.mark.parametrize(
    ("start", "size", "halved", "scaled", "offset"),
    [
        ((500, 375), 64, [(250, 187), (125, 93)], (86, 64), (11, 0)),
        ((375, 500), 64, [(187, 250), (93, 125)], (64, 86), (0, 11)),
        ((128, 128), 64, [(64, 64)], (64, 64), (0, 0)),  # a shorter side of twice the size is halved
        ((127, 200), 64, [], (64, 101), (0, 18)),
        ((200, 127), 64, [], (101, 64), (18, 0)),
        ((300, 64), 64, [], (300, 64), (118, 0)),
        ((7, 5), 64, [], (90, 64), (13, 0)),  # 89.6 is rounded
        ((20, 17), 32, [], (38, 32), (3, 0)),
        ((1, 1), 16, [], (16, 16), (0, 0)),
        ((333, 1000), 32, [(166, 500), (83, 250), (41, 125)], (32, 98), (0, 33)),
    ],
)
def test_the_crop_is_adms(start, size, halved, scaled, offset):
    image = smooth(*start)
    expected = np.asarray(image).astype(float)
    for sides in halved:
        expected = resized(expected, sides, box, 0.5 + 1e-9)
    expected = resized(expected, scaled, bicubic, 2)
    left, top = offset
    expected = expected[top : top + size, left : left + size]
    cropped = center_crop(image, size)
    assert cropped.size == (size, size)
    off = np.abs(np.asarray(cropped).astype(float) - expected)
    assert off.max() <= 2 and off.mean() < 0.1  # levels: PIL's weights are rounded, and what is halved is rounded again


def save(path, image: Image.Image, **settings) -> SourceImage:
    image.save(path, **settings)
    return SourceImage(path.name, 0, "key")


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1", "YCbCr"])
def test_images_of_every_mode_become_rgb_or_grey(tmp_path, mode):
    image = smooth(40, 30).convert(mode)
    name = "a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"
    source = save(tmp_path / name, image)
    with Image.open(tmp_path / name) as again:
        colours, grey = again.convert("RGB"), again.convert("L")
    three, one = load_image(tmp_path, source, 16, 3), load_image(tmp_path, source, 16, 1)
    assert three.shape == (3, 16, 16) and one.shape == (1, 16, 16) and three.dtype == one.dtype == np.uint8
    assert three.flags.c_contiguous and one.flags.c_contiguous
    assert np.array_equal(three, np.asarray(center_crop(colours, 16)).transpose(2, 0, 1))
    assert np.array_equal(one[0], np.asarray(center_crop(grey, 16)))


def test_exif_orientation_is_left_alone_and_broken_exif_makes_no_noise(tmp_path):
    image = smooth(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "turned.png", image, exif=exif)
    plain = save(tmp_path / "plain.png", image)
    assert np.array_equal(load_image(tmp_path, turned, 16, 3), load_image(tmp_path, plain, 16, 3))
    palette = save(tmp_path / "palette.png", image.convert("P"), transparency=b"\0" * 256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning), Image.open(tmp_path / "palette.png") as noisy:
            noisy.convert("RGB")
        load_image(tmp_path, palette, 16, 3)


# bad images


def test_a_bad_image_is_told_in_one_line(tmp_path, monkeypatch):
    good = save(tmp_path / "good.jpg", smooth(64, 64))
    content = (tmp_path / "good.jpg").read_bytes()
    for name, bytes_, says in (
        ("cut.jpg", content[: len(content) // 2], "image file is truncated"),
        ("empty.jpg", b"", "is not one of JPEG, PNG, WEBP, BMP, GIF"),
        ("text.jpg", b"no image", "is not one of JPEG, PNG, WEBP, BMP, GIF"),
        ("torn.png", png()[:40] + b"\0" * 40, "."),
    ):
        (tmp_path / name).write_bytes(bytes_)
        with pytest.raises(BadImageError, match=says) as caught:
            load_image(tmp_path, SourceImage(name, 0, "key"), 16, 3)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(BadImageError, match="No such file"):
        load_image(tmp_path, SourceImage("absent.jpg", 0, "key"), 16, 3)
    smooth(64, 64).save(tmp_path / "a.jpg", "TIFF")  # known to PIL, but not in FORMATS
    with pytest.raises(BadImageError, match="is not one of"):
        load_image(tmp_path, SourceImage("a.jpg", 0, "key"), 16, 3)
    sliver = save(tmp_path / "sliver.png", smooth(3000, 1))
    with pytest.raises(BadImageError, match="3000x1 pixels would become 768000x256 at a shorter side of 256"):
        load_image(tmp_path, sliver, 256, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImageError, match="decompression bomb"):
        load_image(tmp_path, good, 16, 3)


def test_a_machine_without_memory_is_no_bad_image(tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    source = save(tmp_path / "good.jpg", smooth(64, 64))
    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        load_image(tmp_path, source, 16, 3)


# trees


def test_labels_count_the_folders_in_alphabetical_order(tmp_path):
    tree(tmp_path, "n02/b.png", "n02/a.JPEG", "n10/c.Jpg", "n1/deeper/still/d.webp", "Z/e.bmp", "Z/f.gif")
    (tmp_path / "n02" / "notes.txt").write_text("no image")
    (tmp_path / "LICENSE").write_text("no class")
    images, classes = list_images(tmp_path, "jpg", None)
    assert classes == 4
    assert [(image.path, image.label, image.key) for image in images] == [
        ("Z/e.bmp", 0, "Z-e"),
        ("Z/f.gif", 0, "Z-f"),
        ("n02/a.JPEG", 1, "n02-a"),
        ("n02/b.png", 1, "n02-b"),
        ("n1/deeper/still/d.webp", 2, "n1-deeper-still-d"),
        ("n10/c.Jpg", 3, "n10-c"),
    ]
    assert np.array_equal(load_image(tmp_path, images[2], 8, 3), np.asarray(smooth(8, 8, 1)).transpose(2, 0, 1))
    assert list_images(tmp_path, "jpg", 9)[1] == 9
    with pytest.raises(DataError, match="n10/c.Jpg: label 3 is outside 0..2"):
        list_images(tmp_path, "jpg", 3)


def test_linked_folders_are_followed(tmp_path):
    tree(tmp_path, "elsewhere/a.png", "elsewhere/more/b.png", "source/x/c.png")
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "x" / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    images, _ = list_images(tmp_path / "source", "jpg", None)
    assert [image.key for image in images] == ["linked-a", "linked-more-b", "x-c", "x-linked-b"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a/x.png", ".hidden/x.txt"], r"\.hidden contains no image .*, so it is not a class: the labels after it would shift"),
        (["a/x.png", "b/x.tiff"], "/b contains no image"),
        (["a/x.png", "stray.JPG"], "stray.JPG is not in a class folder"),
        (["notes.txt"], "contains neither tars nor class folders"),
        (["a/x.png", "a/x.jpg"], r"a/x.jpg and .*/a/x.png would both have the key a-x"),
        (["a/x/y.png", "a/x-y.png"], "a/x-y.png and .*/a/x/y.png would both have the key a-x-y"),
        (["a/b.c.png", "a/b_c.png"], "would both have the key a-b_c"),
        (["a/x.png", "b.tar"], None),
    ],
)
def test_what_would_shift_labels_or_merge_samples_is_refused_by_name(tmp_path, names, says):
    tree(tmp_path, *names)
    with pytest.raises(DataError if says else UsageError, match=says or r"contains both tars \(b.tar\) and folders \(a\)"):
        list_images(tmp_path, "jpg", None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path):
    tree(tmp_path, "a/x.png", "a/closed/y.png")
    (tmp_path / "a" / "closed").chmod(0)
    with pytest.raises(PermissionError):
        list_images(tmp_path, "jpg", None)
    (tmp_path / "a" / "closed").chmod(0o755)


def test_os_errors_below_a_class_are_raised(tmp_path, monkeypatch):
    tree(tmp_path, "a/x.png", "a/closed/y.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        list_images(tmp_path, "jpg", None)


def test_long_names_get_a_number_and_their_tail(tmp_path):
    long, wide = "x" * 100, "é" * 60
    tree(tmp_path, f"a/{long}1.png", f"a/{long}2.png", f"a/{wide}.png", f"a/{'y' * (MAX_KEY - 2)}.png")
    keys = [image.key for image in list_images(tmp_path, "jpg", None)[0]]
    assert keys[:3] == [f"00000000-{'x' * 70}1", f"00000001-{'x' * 70}2", f"a-{'y' * (MAX_KEY - 2)}"]
    assert keys[3] == f"00000003-{'é' * 35}" and all(len(key.encode()) <= MAX_KEY for key in keys)


# tars


def test_tars_of_stock_webdataset_are_listed_and_read(tmp_path):
    tars(tmp_path, [4, 0, 4, 2, 1], key="deep/s.{:02d}".replace(".", "_"))
    images, classes = list_images(tmp_path, "jpg", 5)
    assert classes == 5 and [image.label for image in images] == [4, 0, 4, 2, 1]
    assert [image.key for image in images[2:4]] == ["part-00-deep-s_02", "part-01-deep-s_03"]
    assert images[3].name == "part-01.tar, sample deep/s_03"
    for number, image in enumerate(images):
        assert np.array_equal(load_image(tmp_path, image, 8, 3), np.asarray(smooth(8, 8, number)).transpose(2, 0, 1))


def test_the_same_key_in_two_tars_is_two_samples(tmp_path):
    for part in ("x", "y"):
        tars(tmp_path / part, [0])
        (tmp_path / part / "part-00.tar").rename(tmp_path / f"{part}.tar")
        (tmp_path / part).rmdir()
    assert [image.key for image in list_images(tmp_path, "jpg", 1)[0]] == ["x-s00", "y-s00"]


def test_tars_that_are_not_images_with_labels_are_refused(tmp_path):
    tars(tmp_path, [4, 0, 4, 2, 1])
    with pytest.raises(UsageError, match="contains tars, which do not give the number of classes: set --classes"):
        list_images(tmp_path, "jpg", None)
    with pytest.raises(DataError, match="part-00.tar, sample s00: label 4 is outside 0..3"):
        list_images(tmp_path, "jpg", 4)
    with pytest.raises(DataError, match=r"part-00.tar, sample s00 \(number 0\): webp is missing"):
        list_images(tmp_path, "webp", 5)
    content = (tmp_path / "part-01.tar").read_bytes()
    for keep in (len(content) - 9000, 700, 100, 0):
        (tmp_path / "part-01.tar").write_bytes(content[:keep])
        with pytest.raises(DataError, match="part-01.tar"):
            list_images(tmp_path, "jpg", 5)
    (tmp_path / "part-01.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(DataError, match="part-01.tar holds no samples with jpg and cls"):
        list_images(tmp_path, "jpg", 5)


def test_an_index_without_checksums_has_the_same_places(tmp_path):
    tars(tmp_path, [4, 0, 4])
    with (tmp_path / "part-00.tar").open("rb") as file:
        whole, bare = (index_tar(file, "x", Members(latent="jpg"), False, checksums=checksums) for checksums in (True, False))
    assert set(bare.latent.crc32) == {0} and 0 not in whole.latent.crc32
    bare.latent.crc32 = whole.latent.crc32
    assert bare == whole
