"""Parameter names of the published xAR state dicts, by an explicit map."""

from collections.abc import Collection

import torch

from xar_scale.checkpoint.manifest import POSITIONS
from xar_scale.config import ModelConfig
from xar_scale.errors import DataError

# published -> ours; _BLOCK applies to every block
_TOP = {
    "class_emb.weight": "class_embed.weight",
    "time_embed.mlp.0.weight": "time_embed.fc1.weight",
    "time_embed.mlp.0.bias": "time_embed.fc1.bias",
    "time_embed.mlp.2.weight": "time_embed.fc2.weight",
    "time_embed.mlp.2.bias": "time_embed.fc2.bias",
    "z_proj.weight": "in_proj.weight",
    "z_proj.bias": "in_proj.bias",
    "encoder_pos_embed_learned": "encoder_pos",
    "z_proj_ln.weight": "in_norm.weight",
    "encoder_norm.weight": "encoder_norm.weight",
    "decoder_embed.weight": "mid_proj.weight",
    "decoder_embed.bias": "mid_proj.bias",
    "decoder_pos_embed_learned": "decoder_pos",
    "decoder_norm.weight": "decoder_norm.weight",
    "pred.weight": "out_proj.weight",
    "pred.bias": "out_proj.bias",
}
_BLOCK = {
    "attn.qkv.weight": "attn.qkv.weight",
    "attn.qkv.bias": "attn.qkv.bias",
    "attn.proj.weight": "attn.proj.weight",
    "attn.proj.bias": "attn.proj.bias",
    "mlp.fc1_g.weight": "mlp.gate.weight",
    "mlp.fc1_g.bias": "mlp.gate.bias",
    "mlp.fc1_x.weight": "mlp.up.weight",
    "mlp.fc1_x.bias": "mlp.up.bias",
    "mlp.fc2.weight": "mlp.down.weight",
    "mlp.fc2.bias": "mlp.down.bias",
    "ada_lin.1.weight": "ada.weight",
    "ada_lin.1.bias": "ada.bias",
}
_PUBLISHED = "class_emb.weight"  # published weights are recognised by this name


def official_names(config: ModelConfig) -> dict[str, str]:
    """Published parameter name -> ours, for every parameter of a model of these depths."""
    return _names(config.depth_encoder, config.depth_decoder)


def _names(depth_encoder: int, depth_decoder: int) -> dict[str, str]:
    names = dict(_TOP)
    for part, depth in (("encoder", depth_encoder), ("decoder", depth_decoder)):
        for block in range(depth):
            names |= {f"{part}_blocks.{block}.{theirs}": f"{part}.{block}.{ours}" for theirs, ours in _BLOCK.items()}
    return names


def our_names(given: Collection[str]) -> dict[str, str]:
    """Map each name to ours, without the published constants. Names that are not published ones map to themselves.

    Raises DataError if they are published names and some are missing or unknown.
    """
    if _PUBLISHED not in given:
        return {name: name for name in given}
    names = _names(*(_depth(given, f"{part}_blocks.") for part in ("encoder", "decoder")))
    _check_names(names, [name for name in given if not _is_constant(name)])
    return names


def their_names(given: Collection[str]) -> dict[str, str]:
    """Map our names to published ones. Raises DataError if these are not the parameter names of an xAR network."""
    names = {ours: theirs for theirs, ours in _names(*(_depth(given, f"{part}.") for part in ("encoder", "decoder"))).items()}
    _check_names(names, given, "weights under our names")
    return names


def their_shape(name: str, shape: torch.Size) -> torch.Size:
    """Return the published shape of the parameter that we call ``name``."""
    return torch.Size((1, *shape)) if name in POSITIONS else shape


def _depth(names: Collection[str], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def _check_names(wanted: Collection[str], given: Collection[str], what: str = "published weights") -> None:
    if missing := sorted(set(wanted) - set(given)):
        raise DataError(f"{what} lack {len(missing)} entries, first {missing[0]}")
    if unknown := sorted(set(given) - set(wanted)):
        raise DataError(f"{what} hold {len(unknown)} unknown entries, first {unknown[0]}")


def _is_constant(name: str) -> bool:
    """Whether it is a published buffer that follows from the sizes."""
    return name == "mask" or ".rope.freqs" in name
