"""Sets of generated images: contents, resuming, refusals; and the evaluation of digits."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch

from tests.unit.tiny_run import Run
from xar_scale.checkpoint.manifest import verify
from xar_scale.errors import DataError, UsageError
from xar_scale.evaluate import digits, imageset
from xar_scale.evaluate.digits import digit_classifier, load_digits
from xar_scale.evaluate.evaluation import Comparison, image_set
from xar_scale.evaluate.generate import open_generator
from xar_scale.evaluate.images import ImagesInMemory
from xar_scale.evaluate.trained import open_trained

CPU = torch.device("cpu")
FEW = ["sample.sampler=euler", "sample.steps=1", "sample.guidance=1.0", "sample.batch=5"]
COUNT = 23


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.setattr("xar_scale.evaluate.imageset.PART", 8)
    run = Run(tmp_path / "run")
    run.train(3)
    return open_trained(verify(run.save()).path, FEW)


def everything(images) -> np.ndarray:
    return np.concatenate([images.read(part) for part in range(images.parts)])


def test_images_are_numbered_and_classes_take_turns(tmp_path, trained):
    images, generator = image_set(trained, tmp_path / "set", COUNT, 4), open_generator(trained, CPU)
    images.open()
    images.draw(generator)
    assert images.parts == 3 and images.missing() == [] and images.labels.tolist() == [n % 10 for n in range(COUNT)]
    found = everything(images)
    assert len(found) == COUNT
    alone = generator.draw([7], 4, first=17)[0]
    assert np.abs(found[17].astype(int) - alone).max() <= 1
    larger = image_set(trained, tmp_path / "larger", COUNT + 9, 4)
    larger.open()
    larger.draw(generator)
    assert np.abs(everything(larger)[:COUNT].astype(int) - found).max() <= 1


def test_finished_parts_are_kept(tmp_path, trained, monkeypatch):
    images, generator = image_set(trained, tmp_path / "set", COUNT, 4), open_generator(trained, CPU)
    images.open()
    saved, cut = [], imageset._save

    def killed(path, values):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path.name)
        cut(path, values)

    monkeypatch.setattr(imageset, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        images.draw(generator)
    assert images.missing() == [2]
    before = {path.name: path.stat().st_mtime_ns for path in images.folder.glob("part-*")}
    monkeypatch.setattr(imageset, "_save", cut)
    images.open()
    images.draw(generator)
    after = {path.name: path.stat().st_mtime_ns for path in images.folder.glob("part-*")}
    assert len(after) == 3 and {name: after[name] for name in before} == before
    other = image_set(trained, tmp_path / "other", COUNT, 4)
    other.open()
    other.draw(generator)
    assert np.array_equal(everything(images), everything(other))


def test_a_folder_of_another_set_is_refused(tmp_path, trained):
    image_set(trained, tmp_path / "set", COUNT, 4).open()
    image_set(trained, tmp_path / "set", COUNT, 4).open()
    for other, said in (
        (image_set(trained, tmp_path / "set", COUNT + 1, 4), "images is 23 there, 24 here"),
        (image_set(trained, tmp_path / "set", COUNT, 5), "seed is 4 there, 5 here"),
    ):
        with pytest.raises(UsageError, match=f"holds a different set: {said}"):
            other.open()
    changed = ["sampler=heun", "steps=2", "guidance=2.0", "guidance_schedule=cosine", "guidance_interval=[0.1,1]"]
    for word in [*(f"sample.{word}" for word in [*changed, "precision=fp32"]), "kernels.attention=flex"]:
        with pytest.raises(UsageError, match=f"holds a different set: {word.partition('.')[0]} is "):
            image_set(open_trained(trained.source.path, [*FEW, word]), tmp_path / "set", COUNT, 4).open()
    # what images do not depend on may change
    image_set(open_trained(trained.source.path, [*FEW, "sample.every=3"]), tmp_path / "set", COUNT, 4).open()
    image_set(open_trained(trained.source.path, [*FEW, "sample.batch=64"]), tmp_path / "set", COUNT, 4).open()
    described = json.loads((tmp_path / "set" / "set.json").read_text())
    assert described["weights"] == trained.sha256 and described["vectors"] == "ema"
    assert (
        described["drawn_with"]["device"] == "1 x cpu" and described["drawn_with"]["torch"] == torch.__version__.split("+")[0]
    )


def test_all_devices_that_generated_a_set_are_recorded(tmp_path, trained):
    begun = dataclasses.replace(image_set(trained, tmp_path / "set", COUNT, 4), here={"torch": "2.11.0", "device": "8 x A"})
    begun.open()
    for device in ("1 x B", "1 x B", "8 x A"):
        dataclasses.replace(begun, here={"torch": "2.11.0", "device": device, "new": "1"}).open()
    assert begun.made_with() == {"torch": "2.11.0", "device": "8 x A, 1 x B", "new": "1"}
    begun.draw(open_generator(trained, CPU))
    dataclasses.replace(begun, here={"torch": "3.0", "device": "8 x C"}).open()  # a process that only evaluates
    assert begun.made_with()["torch"] == "2.11.0"


def test_images_without_a_valid_description_are_refused(tmp_path, trained):
    images = image_set(trained, tmp_path / "set", COUNT, 4)
    images.open()
    images.draw(open_generator(trained, CPU))
    for torn in ("[1]", "[" * 100000):
        (tmp_path / "set" / "set.json").write_text(torn)
        with pytest.raises(DataError, match=r"set.json is torn or changed"):
            images.open()
    (tmp_path / "set" / "set.json").unlink()
    with pytest.raises(UsageError, match=r"holds images of an unknown set: set.json is missing"):
        images.open()


def test_other_weights_are_another_set(tmp_path, trained):
    run = Run(tmp_path / "longer")
    run.train(4)
    image_set(trained, tmp_path / "set", COUNT, 4).open()
    with pytest.raises(UsageError, match="weights is "):
        image_set(open_trained(verify(run.save()).path, FEW), tmp_path / "set", COUNT, 4).open()


def test_a_part_that_is_torn_is_named(tmp_path, trained):
    images = image_set(trained, tmp_path / "set", COUNT, 4)
    images.open()
    images.draw(open_generator(trained, CPU))
    content, archive = images.path(1).read_bytes(), io.BytesIO()
    np.savez(archive, images.read(1))
    for torn in (content[:-9], content[:5], b"", archive.getvalue()):
        images.path(1).write_bytes(torn)
        with pytest.raises(DataError, match=r"part-00001.npy is torn; delete it to generate its images again"):
            images.read(1)
    np.save(images.path(1), np.zeros((3, 1, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"part-00001.npy is uint8\(3, 1, 8, 8\), not 8 images"):
        images.read(1)


def test_progress_covers_all_ranks_and_reaches_the_end(tmp_path, trained, monkeypatch, capsys):
    monkeypatch.setattr(imageset, "PROGRESS_EVERY_S", 0.0)
    images = image_set(trained, tmp_path / "set", COUNT, 4)
    images.open()
    images.draw(open_generator(trained, CPU))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{tmp_path / 'set'}: 23 images in 3 parts, 0 already done"
    assert [line.split(" images")[0] for line in lines[2:]] == ["8/23", "16/23", "23/23"] and lines[-1].endswith("ETA 0 s")


def test_the_classifier_recognizes_real_digits_and_not_noise():
    images, labels, classifier = *load_digits(), digit_classifier()
    assert classifier.accuracy(images, labels) > 0.98
    assert classifier.accuracy(classifier.held_out, classifier.held_out_labels) > 0.97 and len(classifier.held_out) == 450
    assert classifier.svc.shape_fit_ == (1347, 64)  # without the held-out digits
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, images.shape).astype(np.uint8)
    assert classifier.accuracy(noise, labels) < 0.3
    assert np.array_equal(classifier.features(images[:5]), classifier.features(np.repeat(images[:5], 3, axis=1)))


def test_digits_are_compared_with_those_the_classifier_was_fitted_on():
    comparison = Comparison("digits", "inception-v3-compat", CPU)
    held_out, labels = digit_classifier().held_out, digit_classifier().held_out_labels
    real = comparison.evaluate(ImagesInMemory(held_out, labels), labels, {})["metrics"]
    for name in ("frechet_distance", "precision", "recall", "read_as_class"):
        assert real[name] == pytest.approx(real[f"held_out_{name}"], rel=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, held_out.shape, dtype=np.uint8)
    worse = comparison.evaluate(ImagesInMemory(noise), None, {})["metrics"]
    assert worse["frechet_distance"] > 10 * real["frechet_distance"] and worse["precision"] < 0.5 < real["precision"]
    assert "read_as_class" not in worse and comparison.extractor.name == digits.NAME
    with pytest.raises(UsageError, match="--features dinov2-vit-l-14: reference digits uses digits-svm"):
        Comparison("digits", "dinov2-vit-l-14", CPU)
