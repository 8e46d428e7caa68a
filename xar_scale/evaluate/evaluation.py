"""Evaluate a set of images: metrics, and everything needed to reproduce them, as JSON and as a Markdown page."""

import json
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from xar_scale import dist
from xar_scale.checkpoint.files import fingerprint
from xar_scale.config import KernelConfig, SampleConfig
from xar_scale.errors import DataError, UsageError
from xar_scale.evaluate import digits
from xar_scale.evaluate.fidelity import (
    INCEPTION,
    Extractor,
    Images,
    Reference,
    Statistics,
    fetch_inception,
    measure,
    read_statistics,
    statistics_of,
)
from xar_scale.evaluate.images import ImagesInMemory, image_paths, npz_names, open_images
from xar_scale.evaluate.imageset import MADE_WITH, ImageSet
from xar_scale.evaluate.trained import TrainedModel, digest
from xar_scale.files import parse_json, write_atomically
from xar_scale.version import __version__

DIGITS = "digits"  # value of --reference
RESULT, PAGE = "evaluation.json", "evaluation.md"
COMPARED = ("set", "reference", "features")  # sections of a result that must be those of the results it replaces
PACKAGES = ("torch", "torch-fidelity", "numpy", "scikit-learn")
WITHOUT_EFFECT = ("tokenizer_weights", "batch", "shard_ranks", "every", "shown")  # settings that do not change the images
SIDE = 32  # pixels, of dummy images that only show the number of features


def settings_of(sample: SampleConfig, kernels: KernelConfig, precision: str) -> dict[str, Any]:
    """Return the settings that determine images, apart from weights, tokenizer and seed, as plain values."""
    kept = {key: value for key, value in asdict(sample).items() if key not in WITHOUT_EFFECT}
    values: dict[str, Any] = json.loads(json.dumps({"sample": {**kept, "precision": precision}, "kernels": asdict(kernels)}))
    return values


def image_set(trained: TrainedModel, folder: Path, count: int, seed: int) -> ImageSet:
    """Return the set of images that an evaluation generates."""
    origin = {"weights": trained.sha256, "vectors": trained.kind, "tokenizer": trained.tokenizer}
    origin |= settings_of(trained.sample, trained.kernels, trained.sample.precision)
    return ImageSet(folder, count, trained.model.classes, seed, origin, versions(dist.local_device()))


class Comparison:
    """Compares images with a reference: ``digits``, statistics (an npz with mu and sigma), or images, which give more metrics.

    ADM's reference batches hold images and statistics: the distance then uses the statistics.
    """

    def __init__(self, reference: str, features: str, device: torch.device, weights: Path | None = None) -> None:
        """Every rank calls this. Raises UsageError, DataError."""
        self.path, path = reference, Path(reference)
        self.digits = reference == DIGITS
        if self.digits and features not in (INCEPTION, digits.NAME):
            raise UsageError(f"--features {features}: reference {DIGITS} uses {digits.NAME}")
        if self.digits:
            digits.register_features()
            features, opened = digits.NAME, _ReferenceData(images=ImagesInMemory(digits.digit_classifier().fitted))
        else:
            opened = dist.on_all_ranks(lambda: _open_reference(path))
        if features == INCEPTION and weights is None:
            dist.on_all_ranks(fetch_inception)
        self.extractor = dist.on_all_ranks(lambda: Extractor(features, device, weights))
        self.sha256 = "" if self.digits else dist.on_rank_0(lambda: sha256_of(path))  # the file may have many gigabytes
        found = {} if opened.images is None else self.extractor.extract_all(opened.images)

        def settle() -> None:
            there = found or self.extractor.extract(np.zeros((2, 3, SIDE, SIDE), np.uint8))
            own = statistics_of(there, self.extractor)
            statistics = own if opened.statistics is None else opened.statistics
            if len(statistics["mu"]) != len(own["mu"]):
                raise DataError(
                    f"{reference} has {len(statistics['mu'])} features, but {self.extractor.name} has {len(own['mu'])}"
                )
            self.reference = Reference(statistics, found or None)
            self.held_out = self._held_out() if self.digits else {}

        dist.on_rank_0(settle)

    @property
    def name(self) -> str:
        """Return the name of the folder of results."""
        stem, features = Path(self.path).stem, self.extractor.name
        return stem if features in (INCEPTION, digits.NAME) else f"{stem}-{features}"

    @property
    def description(self) -> dict[str, Any]:
        """Return the reference and the feature extractor."""
        return {
            "reference": {"path": self.path, "sha256": self.sha256},
            "features": {"name": self.extractor.name, "sha256": self.extractor.sha256},
        }

    def evaluate(self, images: Images, labels: np.ndarray | None, drawn: dict[str, Any]) -> dict[str, Any]:
        """Return the metrics and everything they depend on. Every rank calls this.

        ``drawn``: the sections that describe the images and how they were generated.
        """
        features = self.extractor.extract_all(images)
        metrics = dist.on_rank_0(lambda: measure(features, self.reference, self.extractor))
        if self.digits:
            metrics |= dist.on_rank_0(lambda: self._digit_metrics(images, labels))
        return {"metrics": metrics, **drawn, **self.description, "versions": versions(self.extractor.device)}

    def _held_out(self) -> dict[str, float]:
        """Return the metrics of the real digits that the classifier was not fitted on: the best that can be reached."""
        classifier = digits.digit_classifier()
        found = measure(self.extractor.extract(classifier.held_out), self.reference, self.extractor)
        found["read_as_class"] = classifier.accuracy(classifier.held_out, classifier.held_out_labels)
        return {f"held_out_{name}": value for name, value in found.items()}

    def _digit_metrics(self, images: Images, labels: np.ndarray | None) -> dict[str, float]:
        """Return the metrics that only digits have."""
        if labels is None:
            return self.held_out
        every = np.concatenate([images.read(part) for part in range(images.parts)])
        return self.held_out | {"read_as_class": digits.digit_classifier().accuracy(every, labels)}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's images in the order of their names."""
    return fingerprint(path).sha256 if path.is_file() else digest(fingerprint(file).sha256 for file in image_paths(path))


class _ReferenceData(NamedTuple):
    statistics: Statistics | None = None
    images: Images | None = None


def _open_reference(path: Path) -> _ReferenceData:
    if not path.exists():
        raise UsageError(f"no reference at {path}: expected {DIGITS}, an npz of statistics or images, or a folder of images")
    names = npz_names(path) if path.suffix == ".npz" else []
    statistics = read_statistics(path) if ("arr_0" not in names and names) or "mu" in names else None
    return _ReferenceData(statistics, open_images(path) if "arr_0" in names or not names else None)


def describe(images: ImageSet, trained: TrainedModel) -> dict[str, Any]:
    """Return the sections that describe a generated set and its weights."""
    described = {name: value for name, value in images.description.items() if name != "weights"}
    return {
        "set": described | {MADE_WITH: images.made_with()},
        "weights": {"path": str(trained.source.path), "sha256": trained.sha256, "step": trained.source.step},
    }


def read_result(folder: Path) -> dict[str, Any]:
    """Return the results in ``folder``, {} if there are none. Raises DataError if they cannot be read."""
    path = folder / RESULT
    if not path.is_file():
        return {}
    try:
        values = parse_json(path.read_text())
        return {**values, **{section: dict(values[section]) for section in COMPARED}}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is torn or changed; remove it or write elsewhere") from None


def check_folder(folder: Path, wanted: dict[str, Any]) -> None:
    """Raises UsageError if ``folder`` holds results of another set, reference or features than ``wanted``, DataError if its
    results cannot be read.
    """
    kept, wanted = read_result(folder), json.loads(json.dumps(wanted))
    for section in COMPARED if kept else ():
        known = {*kept[section], *wanted[section]} - {"path", MADE_WITH}  # neither identifies the contents
        if any(kept[section].get(name) != wanted[section].get(name) for name in known):
            raise UsageError(f"{folder / RESULT} has results of a different {section}; remove it or write elsewhere")


def write(folder: Path, result: dict[str, Any]) -> None:
    """Write the result as JSON and as a page. Raises UsageError if the folder holds other results."""
    check_folder(folder, result)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PAGE, _page(result).encode())
    write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions of the packages used, and the devices."""
    found = {"xar_scale": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return found | {"device": f"{dist.world()} x {machine}"}


def _page(result: dict[str, Any]) -> str:
    lines = ["# Evaluation", "", "| metric | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.4f} |" for name, value in result["metrics"].items()]
    if result["features"]["name"] != INCEPTION:
        lines += ["", f"Computed from {result['features']['name']} features: these are not FID or IS."]
    lines += ["", "| setting | value |", "| --- | --- |"]
    for section in [key for key in result if key != "metrics"]:
        lines += [f"| {section}: {name} | {value} |" for name, value in _flat(result[section])]
    return "\n".join(lines) + "\n"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat
