"""Open trained weights on disk for sampling, with their sampler settings and tokenizer."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xar_scale import dist
from xar_scale.checkpoint.files import fingerprint
from xar_scale.checkpoint.interop import Source, open_source
from xar_scale.checkpoint.interop.pretrained import config_of, preset_of
from xar_scale.checkpoint.manifest import FOLDER, MANIFEST, Checkpoint, open_checkpoint
from xar_scale.checkpoint.reshard.writer import verify_source
from xar_scale.config import Config, KernelConfig, ModelConfig, SampleConfig, override
from xar_scale.errors import ConfigError, UsageError
from xar_scale.evaluate.images import SUFFIXES
from xar_scale.presets import RECIPES
from xar_scale.tokenizers.kl16 import KL16Tokenizer
from xar_scale.validation import validated

WEIGHTS = (".safetensors", ".pth", ".pt")  # suffixes of weight files in a folder
SECTIONS = ("sample.", "kernels.")  # of the config that may be overridden in sampling


@dataclass(frozen=True)
class TrainedModel:
    """A model's weights (EMA if there are any) and the settings for sampling."""

    source: Source
    kind: str  # of vectors: ema or model
    sha256: str  # over all files of the weights
    model: ModelConfig
    sample: SampleConfig
    kernels: KernelConfig
    tokenizer: dict[str, Any]  # description
    latent_scale: float


def is_run(path: Path) -> bool:
    return (path / FOLDER).is_dir()


def holds_weights(path: Path) -> bool:
    """Return whether ``path`` holds weights rather than images."""
    if is_run(path) or (path / MANIFEST).is_file():
        return True
    if path.is_dir() and not any(file.suffix in WEIGHTS for file in path.iterdir()):
        return not any(file.suffix.lower() in SUFFIXES for file in path.rglob("*"))
    return path.suffix != ".npz"


def open_trained(path: Path, overrides: list[str]) -> TrainedModel:
    """Open a run's newest valid checkpoint, one checkpoint, or published weights. Every rank calls this.

    ``overrides``: of ``sample`` and ``kernels``, applied to the run's config or to the recipe of the published model. Raises
    UsageError if there are no weights, DataError if they fail their checksums or fit no known model.
    """
    if wrong := [word for word in overrides if not word.startswith(SECTIONS)]:
        raise UsageError(f"{wrong[0]}: only {'* and '.join(SECTIONS)}* can be changed in sampling")
    if is_run(path) or (path / MANIFEST).is_file():
        return _of_run(open_checkpoint(path), overrides)
    trained = dist.on_all_ranks(lambda: _published(path, overrides))

    def hashed() -> tuple[str, str]:
        verify_source(trained.source, lambda count: None)
        weights = (fingerprint(file).sha256 for file in trained.source.files)
        return digest(weights), fingerprint(Path(trained.sample.tokenizer_weights)).sha256

    sha256, tokenizer = dist.on_rank_0(hashed)  # once: the files have many gigabytes
    return replace(trained, sha256=sha256, tokenizer={"name": "kl16", "sha256": tokenizer})


def _of_run(checkpoint: Checkpoint, overrides: list[str]) -> TrainedModel:
    path, manifest = checkpoint.path, checkpoint.manifest
    if not manifest.config:
        raise UsageError(f"{path} was converted from another format: it has neither a model config nor a tokenizer")
    config = Config.from_dict(override(manifest.config, overrides))
    source = dist.on_all_ranks(lambda: open_source(path))  # the run may drop it meanwhile
    return TrainedModel(
        source,
        source.best_kind,
        digest(entry.sha256 for entry in manifest.files.values()),
        config.model,
        config.sample,
        config.kernels,
        manifest.dataset["tokenizer"],
        manifest.dataset["latent_scale"],
    )


def _published(path: Path, overrides: list[str]) -> TrainedModel:
    """Open published weights; the caller adds the hashes."""
    source = open_source(path)
    kind = source.best_kind
    published = RECIPES.get(f"imagenet256_{preset_of(path, source.names(kind)).removeprefix('xar_')}", {})
    values = override({"sample": published.get("sample", {}), "kernels": {}}, overrides)
    settings = validated(SampleConfig, values["sample"], ConfigError, "sample: ")
    if not settings.tokenizer_weights:
        raise ConfigError(f"{path} does not name its tokenizer: set sample.tokenizer_weights to the path of kl16.ckpt")
    if not Path(settings.tokenizer_weights).is_file():
        raise UsageError(f"no kl16 weights at {settings.tokenizer_weights}")
    return TrainedModel(
        source,
        kind,
        "",
        config_of(source, kind),
        settings,
        validated(KernelConfig, values["kernels"], ConfigError, "kernels: "),
        {},
        KL16Tokenizer.latent_scale,
    )


def digest(hashes: Iterable[str]) -> str:
    """Return one hash for several."""
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
