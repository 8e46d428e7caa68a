"""Whole states of runs, read from their checkpoints, and how near two of them are."""

from pathlib import Path

import torch

from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import FOLDER, read_manifest


def state(run: Path, step: int, folder: str = FOLDER) -> dict[str, torch.Tensor]:
    """All vectors of a checkpoint; or of a snapshot of averages, in another ``folder``."""
    checkpoint = read_manifest(run / folder / f"step-{step:08d}")
    kinds = checkpoint.manifest.kinds
    return {f"{kind}/{name}": tensor for kind in kinds for name, tensor in load_weights(checkpoint, kind).items()}


def assert_bitwise(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each tensor's size, moments and averages too.

    One exception: the bias of the keys hardly has a gradient (softmax takes no notice of what all scores share), so what
    Adam divides by its own size there is rounding noise, which depends on the order of the sum over ranks.
    """
    assert one.keys() == other.keys()
    for name in one:
        tolerance = 1e-3 if name.startswith(("model", "ema")) and name.endswith("attn.qkv.bias") else 1e-5
        error = ((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12)).item()
        assert error < tolerance, f"{name}: {error}"
    for kind in {name.split("/")[0] for name in one}:
        vectors = (torch.cat([t.flatten() for name, t in of.items() if name.startswith(f"{kind}/")]) for of in (one, other))
        whole, reference = vectors
        assert (whole - reference).norm() < 1e-5 * reference.norm(), kind


def assert_same_curve(came: dict, expected: dict) -> None:
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(torch.tensor(came[name]), torch.tensor(expected[name]), rtol=1e-5, atol=0)
