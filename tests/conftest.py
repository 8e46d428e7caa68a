"""Shared fixtures: the reference's golden values, tiny models, latents on disk, processes with a time limit."""

import json
import os
import resource
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from xar_scale.checkpoint.interop import official_names
from xar_scale.config import Config, ModelConfig, override
from xar_scale.data.loader import Batch
from xar_scale.evaluate.digits import cache_digits
from xar_scale.model.xar import XAR
from xar_scale.presets import recipe
from xar_scale.tokenizers.kl16 import KL16Tokenizer

GOLDEN = Path(os.environ.get("XAR_SCALE_GOLDEN", Path(__file__).parent / "golden"))

TINY = ModelConfig(width=64, depth_encoder=2, depth_decoder=2, heads=4)


def digits_config(*overrides: str) -> Config:
    """The demonstration's config with ``section.key=value`` overrides."""
    return Config.from_dict(override(recipe("digits"), list(overrides)))


def random_batch(seed: int, size: int = 8, channels: int = 4) -> Batch:
    """A training batch of the digits' shape."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        latents=torch.randn(size, channels, 4, 4, generator=generator),
        labels=torch.randint(0, 11, (size,), generator=generator),
        t=torch.rand(size, 4, generator=generator),
        noise=torch.randn(size, 16, channels, generator=generator),
        keys=tuple(str(n) for n in range(size)),
        places=torch.stack([torch.zeros(size, dtype=torch.int64), torch.arange(size)], dim=1),
    )


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden values' seeding: an array is a function of its name (float64, standard normal)."""
    return np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()))).standard_normal(shape)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A module's, for its runs; in ``data`` are the digits."""
    folder: Path = tmp_path_factory.mktemp("runs")
    cache_digits(folder / "data", samples_per_shard=500)
    return folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system of a size such as 1200k; the test is skipped where none can be mounted."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip() if done else 'no mount'}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Says how many bytes a file may have from now on: what is written beyond fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def golden_json() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


def golden_parameter(name: str, shape: tuple[int, ...], network: str = "tiny") -> Tensor:
    values = draw(f"public/{network}/{name}", shape)
    if len(shape) == 1:
        values = 0.02 * values + (1 if name.endswith("weight") else 0)
    elif "pos_embed" in name or "class_emb" in name:
        values = 0.5 * values
    else:
        values = values / np.sqrt(np.prod(shape[1:])) * (0.5 if "ada_lin" in name else 1)
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="session")
def tiny_golden_model() -> XAR:
    """The reference's tiny model, its parameters seeded by their published names."""
    model = XAR(TINY)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = official_names(TINY)
    model.load_state_dict({ours: golden_parameter(theirs, shapes[ours]) for theirs, ours in names.items()})
    return model


def kl16_shapes() -> dict[str, list[int]]:
    """The published autoencoder's entries."""
    return json.loads((GOLDEN / "official_state_dicts.json").read_text())["kl16"]


@pytest.fixture(scope="session")
def kl16_weights(tmp_path_factory) -> Iterator[Path]:
    """kl16.ckpt as published, its parameters seeded by their names; 265 MB."""
    path = tmp_path_factory.mktemp("kl16") / "kl16.ckpt"
    torch.save({"model": {name: golden_parameter(name, tuple(shape), "kl16") for name, shape in kl16_shapes().items()}}, path)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def kl16(kl16_weights) -> KL16Tokenizer:
    return KL16Tokenizer(kl16_weights)
