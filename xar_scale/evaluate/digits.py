"""The demo dataset, scikit-learn's 1,797 handwritten digits, and a classifier that serves as its feature extractor."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xar_scale.data.shards import DatasetInfo, ShardWriter
from xar_scale.errors import DataError, UsageError
from xar_scale.evaluate.fidelity import register
from xar_scale.tokenizers.pixel import PixelTokenizer

NAME = "digits-svm"  # of the classifier as a feature extractor
CLASSES = 10
LEVELS = 16  # largest grey level of the set, 0..16
HELD_OUT = 0.25  # share of the real digits that the classifier is not fitted on


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 images (1797, 1, 8, 8), bright ink, and labels (1797,). Raises UsageError without scikit-learn."""
    images, labels = _sklearn("datasets").load_digits(return_X_y=True)
    return np.round(images.reshape(-1, 1, 8, 8) * (255 / LEVELS)).astype(np.uint8), labels


def cache_digits(folder: Path, samples_per_shard: int) -> tuple[int, int]:
    """Encode the digits with the pixel tokenizer into a data set. Returns the numbers of samples and shards written."""
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


class DigitClassifier:
    """A support vector classifier, fitted on three quarters of the real digits; the rest is held out.

    ``images`` below are uint8 (N, 1, 8, 8), or (N, 3, 8, 8) with one channel three times.
    """

    def __init__(self) -> None:
        images, labels = load_digits()
        split = _sklearn("model_selection").train_test_split(
            images, labels, test_size=HELD_OUT, stratify=labels, random_state=0
        )
        self.fitted, self.held_out, fitted_labels, self.held_out_labels = split
        self.svc = _sklearn("svm").SVC(gamma=0.001, decision_function_shape="ovr")
        self.svc.fit(_pixels(self.fitted), fitted_labels)

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return the decision values for each class, float32 (N, 10)."""
        found: np.ndarray = self.svc.decision_function(_pixels(images)).astype(np.float32)
        return found

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of images classified as their label. Raises DataError unless there is one valid label per image."""
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not np.isin(labels, range(CLASSES)).all():
            given = f"{labels.dtype}{labels.shape}"
            raise DataError(f"the labels are {given}, expected one of 0..{CLASSES - 1} for each of {len(images)} images")
        return float((self.svc.predict(_pixels(images)) == labels).mean())


@cache
def digit_classifier() -> DigitClassifier:
    return DigitClassifier()


def register_features() -> None:
    """Register the decision values with torch-fidelity as the feature extractor ``NAME``."""
    import torch
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Decisions(FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("decisions",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return {"fid": "decisions", "prc": "decisions"}[metric]  # no KID: it assumes features on Inception's scale

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (torch.from_numpy(digit_classifier().features(images.cpu().numpy())),)

    register(NAME, Decisions)


def _pixels(images: np.ndarray) -> np.ndarray:
    """Return the first channel as (N, 64) in levels 0..16. Raises DataError for images of another type or size."""
    if images.dtype != np.uint8 or images.shape[1:] not in ((1, 8, 8), (3, 8, 8)):
        raise DataError(f"the images are {images.dtype}{images.shape[1:]}, but digits are uint8(1, 8, 8)")
    return images[:, 0].reshape(len(images), -1) * (LEVELS / 255)


def _sklearn(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise UsageError("the digits need scikit-learn: pip install 'xar_scale[demo]'") from None
