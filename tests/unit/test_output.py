"""Parsing of classes and seeds, and writing of image files."""

import errno
import os
import sys

import numpy as np
import pytest
from PIL import Image

from tools import draw_entities
from xar_scale.errors import UsageError
from xar_scale.evaluate.classes import names, parse_classes, parse_seeds, title
from xar_scale.evaluate.images import open_images
from xar_scale.evaluate.output import SampledImages, check_output, draw_grid

IMAGENET = 1000


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("207", [207]),
        ("golden retriever, 207", [207]),
        ("Golden Retriever,n02099601", [207]),
        ("0-3,7", [0, 1, 2, 3, 7]),
        ("man-eating shark", [2]),
        ("tench,Tinca tinca", [0]),
    ],
)
def test_classes_go_by_number_and_by_name(text, numbers):
    assert parse_classes(text, IMAGENET) == numbers


@pytest.mark.parametrize(
    ("text", "classes", "said"),
    [
        ("10", 10, r"class 10 is outside 0..9"),
        ("3-10", 10, r"class 3-10 is outside 0..9"),
        ("7-3", 10, r"classes 7-3: a range must go from"),
        ("seven", 10, r"class 'seven' is not a number in 0..9; names need 1000 ImageNet classes"),
        ("-1", 10, r"class '-1' is not a number in 0..9"),
        ("1,,2", 10, "empty entry between commas"),
        ("golden retreiver", IMAGENET, "no class is named 'golden retreiver'; similar names: golden retriever"),
        ("crane", IMAGENET, r"'crane' names 2 classes, choose by number: 134 \(crane\), 517 \(crane\)"),
    ],
)
def test_invalid_classes_are_named(text, classes, said):
    with pytest.raises(UsageError, match=said):
        parse_classes(text, classes)


def test_every_class_of_imagenet_has_names():
    assert len({title(number, IMAGENET) for number in range(IMAGENET)}) == IMAGENET
    assert title(207, IMAGENET) == "207 golden retriever" and names(0) == ["tench", "Tinca tinca"]
    assert title(7, 10) == "7"


def test_seeds_are_numbers_and_ranges():
    assert parse_seeds("0-3, 17,2") == [0, 1, 2, 3, 17]
    for text in ("", "a", "3-1", "1,", "-4"):
        with pytest.raises(UsageError, match="is not a comma-separated list of numbers and ranges"):
            parse_seeds(text)
    assert len(parse_seeds("0-499999,1000000-1499999")) == 1_000_000
    for text in ("18446744073709551616", "0-1000000", "0-499999,1000000-1500000", "0-999999,2000000"):
        with pytest.raises(UsageError, match=r"seeds must be below 2\^64, with at most 1,000,000 in all"):
            parse_seeds(text)


def test_the_grid_has_a_named_row_for_each_entry():
    grey = {level: np.full((1, 8, 8), level, np.uint8) for level in (10, 20, 200)}
    pixels = np.asarray(draw_grid({"2": np.stack([grey[200]]), "5": np.stack([grey[10], grey[20]])}))
    assert pixels.shape[0] == 2 * 52 + 4
    margin = pixels.shape[1] - (2 * 52 + 4)
    assert (pixels[:, :margin] < 128).any()  # the names
    assert pixels[[28, 80]][:, [margin + 24, margin + 76]].tolist() == [[200, 255], [10, 20]]


def drawn() -> SampledImages:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    return SampledImages(images, [207, 207, 3, 3], [0, 5, 0, 5], {207: "207 golden retriever", 3: "3 tiger shark"}, images[:3])


def test_images_are_written_in_the_format_of_the_suffix(tmp_path):
    made = drawn()
    (tmp_path / "sub").mkdir()
    for name in ("sub/grid.png", "all.npz", "view.gif", "single"):
        check_output(tmp_path / name)
        made.write(tmp_path / name)
    with Image.open(tmp_path / "sub" / "grid.png") as grid:
        assert grid.height == 2 * 68 + 4 and grid.width > 2 * 68 + 100  # a name fits beside them
    with np.load(tmp_path / "all.npz") as archive:
        by_seed = made.images[[0, 2, 1, 3]]  # not by class: the evaluator scores consecutive images
        assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_0"], by_seed.transpose(0, 2, 3, 1))
        assert archive["arr_1"].tolist() == [207, 3, 207, 3]
    assert np.array_equal(open_images(tmp_path / "all.npz").read(0), by_seed)
    with Image.open(tmp_path / "view.gif") as view:
        assert view.n_frames == 3 and view.size == (192, 192) and view.info["loop"] == 0
    assert sorted(path.name for path in (tmp_path / "single").iterdir()) == [
        "class-0003-seed-000000.png",
        "class-0003-seed-000005.png",
        "class-0207-seed-000000.png",
        "class-0207-seed-000005.png",
    ]
    with Image.open(tmp_path / "single" / "class-0003-seed-000005.png") as picture:
        assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), made.images[3])


def test_grey_images_are_colour_for_adms_evaluator(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), dtype=np.uint8)
    SampledImages(grey, [1, 2], [0, 0], {}, []).write(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["arr_0"].shape == (2, 8, 8, 3) and (archive["arr_0"] == grey.transpose(0, 2, 3, 1)).all()


def test_unwritable_outputs_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name, said in (("x.jpg", r"x.jpg must be a .png"), ("folder.png", "folder.png must be"), ("file", "is a file")):
        with pytest.raises(UsageError, match=said):
            check_output(tmp_path / name)


def test_images_keep_their_aspect_ratio(tmp_path):
    wide = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 64), dtype=np.uint8)
    assert draw_grid({"1": wide}).height == 68 + 4
    SampledImages(wide, [1, 1], [0, 1], {1: "1"}, wide).write(tmp_path / "view.gif")
    with Image.open(tmp_path / "view.gif") as view:
        assert view.size == (192, 96)
    (tmp_path / "out.v2").mkdir()
    check_output(tmp_path / "out.v2")  # an existing folder


def test_the_orders_are_written_to_a_png_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    def ended(name):
        monkeypatch.setattr(sys, "argv", ["draw_entities", "--grid", "4", "--out", str(tmp_path / name)])
        return draw_entities.main(), capsys.readouterr().err

    (tmp_path / "folder.png").mkdir()
    for name in ("orders.foo", "orders", "folder.png"):
        assert ended(name) == (64, f"draw_entities: --out {tmp_path / name} must be a .png file\n")
    path = tmp_path / "orders.png"
    assert ended("orders.png") == (0, "")
    before, full = path.read_bytes(), OSError(errno.ENOSPC, "No space left on device")

    def fill(*_):
        raise full

    monkeypatch.setattr(os, "fsync", fill)
    assert ended("orders.png") == (74, f"draw_entities: {path}: No space left on device\n")
    assert path.read_bytes() == before and not path.with_name("orders.png.tmp").exists()
