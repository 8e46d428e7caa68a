"""FID, IS, KID, precision and recall, by torch-fidelity's functions on features that all ranks extract in parallel."""

import hashlib
import os
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xar_scale import dist
from xar_scale.checkpoint.files import fingerprint
from xar_scale.errors import DataError, UsageError
from xar_scale.evaluate.images import read_npz
from xar_scale.precision import matmul_mode

INCEPTION = "inception-v3-compat"  # only its metrics are called FID and IS
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
PUBLISHED = {"adm_in256_stats.npz": "1da4c17607fe959d54999fd098105649a0c05e15"}  # git blob SHA-1 by file name
BATCH = 64  # images per forward pass
NEIGHBOURS = 3  # k of the nearest neighbours in precision and recall
SPLITS = 10  # of the images; IS is the mean over them
KID_SUBSET = 1000  # images; fewer if the set is smaller
METRICS = ("isc", "fid", "kid", "prc")  # torch-fidelity's names

Statistics = dict[str, np.ndarray]  # "mu" (F,), "sigma" (F, F), float64
Features = dict[str, Tensor]  # by layer (N, F), float32, on the CPU


class Images(Protocol):
    """Images in parts; any rank can read any part."""

    @property
    def parts(self) -> int: ...

    def read(self, part: int) -> np.ndarray:
        """uint8 (N, I, H, W)."""


def fidelity() -> Any:
    """Import torch-fidelity on first use: it takes seconds. Raises UsageError if it is not installed."""
    try:
        import torch_fidelity
        import torch_fidelity.metric_fid
        import torch_fidelity.metric_isc
        import torch_fidelity.metric_kid
        import torch_fidelity.metric_prc
        import torch_fidelity.registry
        import torch_fidelity.utils
    except ImportError:
        raise UsageError("image metrics need torch-fidelity: pip install 'xar_scale[evaluate]'") from None
    return torch_fidelity


class Extractor:
    """A feature extractor of torch-fidelity, built in or registered there, on this rank's device."""

    def __init__(self, name: str, device: torch.device, weights: Path | None = None) -> None:
        """``weights``: Inception's (none: torch-fidelity's copy). Raises UsageError for an unknown name or missing weights."""
        library = fidelity()
        kinds = library.registry.FEATURE_EXTRACTORS_REGISTRY
        if name not in kinds:
            raise UsageError(f"no feature extractor {name!r}; available: {', '.join(kinds)}")
        options: dict[str, Any] = {}
        self.name, self.device, self.sha256 = name, device, ""
        if name == INCEPTION:
            path = inception_weights(weights)
            options["feature_extractor_weights_path"] = str(path)
            self.sha256 = fingerprint(path).sha256
        elif weights is not None:
            raise UsageError(f"--inception-weights are for {INCEPTION}, not for {name}")
        self.layers = {metric: layer for metric in METRICS if (layer := _layer(kinds[name], metric)) is not None}
        wanted = sorted(set(self.layers.values()))
        cuda = device.type == "cuda"
        try:
            self.network = library.utils.create_feature_extractor(name, wanted, cuda=cuda, verbose=False, **options)
        except (OSError, RuntimeError) as error:  # e.g. no network and no weights
            raise UsageError(f"cannot load feature extractor {name}: {' '.join(str(error).split())}") from None

    @torch.no_grad()
    def extract(self, images_NIHW: np.ndarray) -> Features:
        """Return the features of uint8 images (N, I, H, W); grey ones get three equal channels."""
        colour = np.repeat(images_NIHW, 3, axis=1) if images_NIHW.shape[1] == 1 else images_NIHW
        found: list[dict[str, Tensor]] = []
        with matmul_mode("fp32"):
            for start in range(0, len(colour), BATCH):
                batch = torch.tensor(colour[start : start + BATCH], device=self.device)
                values = self.network.convert_features_tuple_to_dict(self.network(batch))
                found.append({layer: value.cpu() for layer, value in values.items()})
        return {layer: torch.cat([values[layer] for values in found]) for layer in found[0]}

    def extract_all(self, images: Images) -> Features:
        """Return all features in image order on rank 0, {} on others. Every rank calls this and extracts some of the parts."""

        def extract(parts: Sequence[int]) -> dict[int, Features]:
            return {part: self.extract(images.read(part)) for part in dist.mine(parts)}

        found: dict[int, Features] = {}
        for first in range(0, images.parts, dist.world()):
            # all ranks stop where one fails: reading a part may generate it, in collectives over sharded weights
            found |= dist.on_all_ranks(partial(extract, range(images.parts)[first : first + dist.world()]))
        gathered = dist.gather_on_rank_0(found)
        by_part = {part: features for of_rank in gathered for part, features in of_rank.items()}
        if not by_part:
            return {}
        return {layer: torch.cat([by_part[part][layer] for part in sorted(by_part)]) for layer in by_part[0]}


def _layer(kind: Any, metric: str) -> str | None:
    """Return the layer that this extractor uses for a metric, or None if it does not support the metric."""
    try:
        layer: str | None = kind.get_default_feature_layer_for_metric(metric)
    except (KeyError, NotImplementedError):
        return None
    return layer


@dataclass(frozen=True)
class Reference:
    """What images are compared with: statistics and, if the reference has images, their features."""

    statistics: Statistics
    features: Features | None = None


def statistics_of(features: Features, extractor: Extractor) -> Statistics:
    """Return torch-fidelity's mean and covariance in float64: it only compares statistics of the same dtype."""
    found = fidelity().metric_fid.fid_features_to_statistics(features[extractor.layers["fid"]])
    return {name: value.astype(np.float64) for name, value in found.items()}


def read_statistics(path: Path) -> Statistics:
    """Return ``mu`` and ``sigma`` of an npz in float64.

    Raises DataError if a file has the name of a published one but other contents, or if mu and sigma are missing, not float32
    or float64, or not a mean and covariance.
    """
    wanted = PUBLISHED.get(path.name)
    if wanted is not None and (found := git_sha1(path.read_bytes())) != wanted:
        raise DataError(f"{path} is not the published {path.name}: its git blob SHA-1 is {found}, not {wanted}")
    arrays = read_npz(path, "mu", "sigma")
    if len(arrays) < 2:
        raise DataError(f"{path} has no mu and sigma")
    if any(values.dtype not in (np.float32, np.float64) for values in arrays.values()):
        given = ", ".join(f"{name} {values.dtype}" for name, values in arrays.items())
        raise DataError(f"{path}: {given}: statistics must be float32 or float64")
    mu, sigma = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (*mu.shape, *mu.shape) or not (np.isfinite(mu).all() and _is_covariance(sigma)):
        raise DataError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not a mean and covariance")
    return {"mu": mu, "sigma": sigma}


def _is_covariance(sigma: np.ndarray) -> bool:
    """Cheap checks only: a triangular root of a covariance, say, would silently give a plausible distance."""
    finite, rounding = bool(np.isfinite(sigma).all()), 1e-5 * np.abs(sigma).max()
    return finite and bool((sigma.diagonal() >= 0).all()) and np.allclose(sigma, sigma.T, rtol=0, atol=rounding)


def git_sha1(content: bytes) -> str:
    """Return the hash by which git identifies a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def measure(features: Features, reference: Reference, extractor: Extractor) -> dict[str, float]:
    """Return, by name, all metrics that the extractor, the reference and the number of images allow."""
    library, layers = fidelity(), extractor.layers
    inception = extractor.name == INCEPTION
    metrics: dict[str, float] = {}
    statistics = statistics_of(features, extractor)
    distance = library.metric_fid.fid_statistics_to_metric(statistics, reference.statistics, False)
    metrics["fid" if inception else "frechet_distance"] = distance[library.KEY_METRIC_FID]
    if "isc" in layers and len(features[layers["isc"]]) >= SPLITS:
        score = library.metric_isc.isc_features_to_metric(features[layers["isc"]], splits=SPLITS)
        prefix = "inception_score" if inception else "classifier_score"
        metrics[prefix] = score[library.KEY_METRIC_ISC_MEAN]
        metrics[f"{prefix}_std"] = score[library.KEY_METRIC_ISC_STD]
    if reference.features is not None and "kid" in layers:
        pair = features[layers["kid"]], reference.features[layers["kid"]]
        subset = min(KID_SUBSET, *map(len, pair))
        kernel = library.metric_kid.kid_features_to_metric(*pair, kid_subset_size=subset, verbose=False)
        prefix = "kid" if inception else "kernel_distance"
        metrics[prefix] = kernel[library.KEY_METRIC_KID_MEAN]
        metrics[f"{prefix}_std"] = kernel[library.KEY_METRIC_KID_STD]
    if reference.features is not None and "prc" in layers:
        pair = features[layers["prc"]], reference.features[layers["prc"]]
        if min(map(len, pair)) <= NEIGHBOURS:
            return metrics
        options = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
        with _all_cores():
            shares = library.metric_prc.prc_features_to_metric(*pair, **options)
        metrics |= {name: shares[name] for name in (library.KEY_METRIC_PRECISION, library.KEY_METRIC_RECALL)}
    return metrics


@contextmanager
def _all_cores() -> Iterator[None]:
    """Use all cores. Launchers give each rank one thread, with which the distances between 50,000 images take a quarter of an
    hour, while the other ranks only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inception_weights(given: Path | None) -> Path:
    """Return the path of the weights, given or torch-fidelity's, after checking the hash: it is a pickle.

    Raises UsageError if there is no file, DataError if it is another.
    """
    path = given or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise UsageError(f"no Inception weights at {path}")
    if (found := fingerprint(path).sha256) != INCEPTION_SHA256:
        raise DataError(f"{path} is not {INCEPTION_FILE}: its SHA-256 is {found:.8}..., not {INCEPTION_SHA256:.8}...")
    return path


def fetch_inception() -> None:
    """Download the weights to torch-fidelity's folder, on one rank per node. Raises UsageError if that fails."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.is_file() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), progress=False)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise UsageError(
            f"no Inception weights at {path}, and {INCEPTION_URL} cannot be downloaded ({reason}): "
            "give their path with --inception-weights, or evaluate.inception_weights in training"
        ) from None


def register(name: str, kind: Callable[..., Any]) -> None:
    """Register a feature extractor with torch-fidelity, once."""
    registry = fidelity().registry
    if name not in registry.FEATURE_EXTRACTORS_REGISTRY:
        registry.register_feature_extractor(name, kind)
