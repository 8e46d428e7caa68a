"""The demonstration's images, scikit-learn's 1,797 handwritten digits, and its judge: a classifier fitted on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xar_scale.data.shards import DatasetInfo, ShardWriter
from xar_scale.errors import DataError, UsageError
from xar_scale.tokenizers.pixel import PixelTokenizer

CLASSES = 10
LEVELS = 16  # grey levels of the set, 0..16
HELD_OUT = 0.25  # share of the real digits that the classifier is not fitted on


@dataclass(frozen=True)
class Verdict:
    """Shares of images that the classifier reads as their class."""

    samples: float
    held_out: float  # real digits that it was not fitted on
    sample_count: int
    held_out_count: int
    by_class: dict[int, float]


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (1797, 1, 8, 8), ink bright, and labels (1797,). Raises UsageError without scikit-learn."""
    images, labels = _sklearn("datasets").load_digits(return_X_y=True)
    return np.round(images.reshape(-1, 1, 8, 8) * (255 / LEVELS)).astype(np.uint8), labels


def cache_digits(folder: Path, samples_per_shard: int) -> tuple[int, int]:
    """The digits through the pixel tokenizer into a data set. Returns the numbers of samples and shards written."""
    images, labels = load_digits()
    tokenizer = PixelTokenizer(patch=2)
    latents = tokenizer.encode(images)
    info = DatasetInfo(
        tokenizer={"name": tokenizer.name, **tokenizer.settings},
        latent_scale=tokenizer.latent_scale,
        stored="latents",
        shape=latents.shape[1:],
        dtype="float16",
        classes=CLASSES,
        flipped=False,
    )
    with ShardWriter(folder, info, prefix="digits", samples_per_shard=samples_per_shard) as writer:
        for number, (latent, label) in enumerate(zip(latents, labels, strict=True)):
            writer.add(f"{number:06d}", int(label), latent)
    return len(latents), len(writer.shards)


def judge(images: np.ndarray, labels: np.ndarray) -> Verdict:
    """Fit a support vector classifier on three quarters of the real digits; read the rest, and ``images`` (N, 1, 8, 8).

    Raises DataError when images or labels are not the digits' kind.
    """
    real, real_labels = load_digits()
    if images.dtype != np.uint8 or images.shape[1:] != real.shape[1:] or not len(images):
        raise DataError(f"the samples are {images.dtype}{images.shape}, digits are one or more of uint8{real.shape[1:]}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not np.isin(labels, range(CLASSES)).all():
        raise DataError(
            f"the labels are {labels.dtype}{labels.shape}, not one of 0..{CLASSES - 1} for each of {len(images)} images"
        )
    split = _sklearn("model_selection").train_test_split(
        _features(real), real_labels, test_size=HELD_OUT, stratify=real_labels, random_state=0
    )
    fit_on, held_out, fit_labels, held_labels = split
    classifier = _sklearn("svm").SVC(gamma=0.001).fit(fit_on, fit_labels)
    right = classifier.predict(_features(images)) == labels
    return Verdict(
        samples=float(right.mean()),
        held_out=float((classifier.predict(held_out) == held_labels).mean()),
        sample_count=len(images),
        held_out_count=len(held_labels),
        by_class={int(label): float(right[labels == label].mean()) for label in np.unique(labels)},
    )


def frechet_distance(images: np.ndarray) -> float:
    """Between Gaussians fitted to the pixels of ``images`` (N, 1, 8, 8) and of all real digits, in the set's grey levels.

    FID's formula (Heusel et al. 2017, equation 6) on pixels: for telling settings of one model apart, nothing else.
    """
    (mean, covariance), (real_mean, real_covariance) = (
        (features.mean(axis=0), np.cov(features, rowvar=False)) for features in map(_features, (images, load_digits()[0]))
    )
    # the trace of the root of the product of two covariances, whose eigenvalues are real and not negative
    root = np.sqrt(np.linalg.eigvals(covariance @ real_covariance).real.clip(min=0)).sum()
    return float(((mean - real_mean) ** 2).sum() + np.trace(covariance) + np.trace(real_covariance) - 2 * root)


def _features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) * (LEVELS / 255)


def _sklearn(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise UsageError("the digits need scikit-learn: pip install 'xar_scale[demo]'") from None
