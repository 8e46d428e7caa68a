"""Small checkpoints of other formats: ZeRO-3's layout by hand, published weights; and a call of tools/reshard.py."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tools.reshard import main
from xar_scale.checkpoint.interop import official_names, open_source
from xar_scale.checkpoint.interop.official import our_names
from xar_scale.config import ModelConfig

SHAPES = {"one.weight": (5, 7), "two.weight": (3, 11), "one.bias": (2,)}  # on three ranks: padded, even, and an empty chunk
GROUPS = [["one.weight"], ["one.bias", "two.weight"]]
TARGETS = ["universal", "safetensors", "pth", "xar-scale"]  # what can be written


def reshard(*words: object) -> int:
    """Run the tool; return its exit code."""
    with patch.object(sys, "argv", ["reshard", *map(str, words)]):
        return main()


def values(path: Path) -> dict[str, Tensor]:
    """Return all vectors of a checkpoint."""
    with open_source(path) as source:
        return {key: source.whole(key) for key in source.shapes}


def assert_bitwise(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def random_state(*kinds: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{kind}/{name}": torch.randn(shape, generator=generator) for kind in kinds for name, shape in SHAPES.items()}


def write_zero3(folder: Path, state: dict[str, Tensor], world: int = 3, **common: Any) -> None:
    """The layout of DeepSpeed 0.19.8; tests/dist/test_reshard.py tests what DeepSpeed itself writes."""
    folder.mkdir()
    shapes = [{name: torch.Size(SHAPES[name]) for name in group} for group in GROUPS]
    for rank in range(world):

        def flat(kind: str, group: list[str], rank: int = rank) -> Tensor:
            return torch.cat([_chunk(state[f"{kind}/{name}"], rank, world) for name in group])

        moments = {
            number: {kind: flat(kind, group) for kind in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(4.0)}
            for number, group in enumerate(GROUPS)
        }
        optimizer = {
            "zero_stage": 3,
            "partition_count": world,
            "fp32_flat_groups": [flat("model", group) for group in GROUPS],
            "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        }
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        model = {"param_shapes": shapes, "global_steps": 5} | common
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def _chunk(tensor: Tensor, rank: int, world: int) -> Tensor:
    size = -(-tensor.numel() // world)
    padded = torch.cat([tensor.flatten(), torch.full((size * world - tensor.numel(),), torch.nan)])
    return padded[rank * size : (rank + 1) * size]


def named_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names."""
    ours = our_names(state)
    return {ours[name]: tensor.squeeze(0) if "_pos_" in name else tensor for name, tensor in state.items() if name in ours}


def published(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Weights under published names, with the constants that the published code saves."""
    named = {theirs: state[ours][None] if "_pos_" in theirs else state[ours] for theirs, ours in official_names(config).items()}
    return named | {"mask": torch.zeros(1, 1, 4, 4), "encoder_blocks.0.attn.rope.freqs": torch.zeros(2)}
