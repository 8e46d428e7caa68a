"""Published weights as a model."""

from pathlib import Path
from typing import Any

import torch

from xar_scale.checkpoint.interop.open import open_source
from xar_scale.checkpoint.interop.source import InMemory, Source
from xar_scale.checkpoint.interop.weights import named_states
from xar_scale.config import ModelConfig
from xar_scale.errors import DataError, UsageError
from xar_scale.model.xar import XAR, meta_model
from xar_scale.presets import MODELS, model_values
from xar_scale.validation import validated


def load_official(source: str | Path | dict[str, Any], ema: bool = True, trust_pickle: bool = False) -> XAR:
    """Return a model with the weights of a ``.pth`` file (or anything else that ``open_source`` reads), or of a state dict.

    ``ema``: if there are two sets of weights, take the EMA weights. Weights without a config get the preset of their sizes.
    Raises UsageError if there is no file, DataError if it is torn, holds no such weights, or matches no preset.
    """
    with _of_state(source) if isinstance(source, dict) else open_source(Path(source), trust_pickle) as opened:
        kind = "ema" if ema and "ema" in opened.kinds else "model"
        if kind not in opened.kinds:
            raise UsageError(f"{opened.path} holds {', '.join(opened.kinds)}, but no {kind}")
        shapes = opened.names(kind)
        model = meta_model(config_of(opened, kind))
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        check_shapes(opened.path, shapes, wanted)
        model.load_state_dict({name: opened.whole(f"{kind}/{name}") for name in shapes}, assign=True)
    return model


def config_of(source: Source, kind: str) -> ModelConfig:
    """Return the config of the model that these weights are for: the source's, or else that of the preset of their sizes.

    Raises DataError if there is no such preset.
    """
    shapes = source.names(kind)
    return _own_config(source) or ModelConfig(**model_values(preset_of(source.path, shapes)))


def check_shapes(path: Path, there: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> None:
    """Raise DataError naming the first parameter whose shape in ``there`` differs from ``wanted``."""
    for name in [*wanted, *there]:
        if (found := there.get(name)) != (ours := wanted.get(name)):
            raise DataError(f"{path}: {name} is {_in_words(found)}, the model's is {_in_words(ours)}")


def _of_state(state: dict[str, Any]) -> Source:
    path = Path("the state dict")
    tensors = named_states(path, state)
    return Source(path, "in memory", {key: tensor.shape for key, tensor in tensors.items()}, InMemory(tensors), [])


def _in_words(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def _own_config(source: Source) -> ModelConfig | None:
    """The config of an xar-scale checkpoint, if it has one."""
    config = source.manifest.config if source.manifest is not None else {}
    return validated(ModelConfig, config["model"], DataError, f"{source.path}: ") if config else None


def preset_of(path: Path, shapes: dict[str, torch.Size]) -> str:
    """Return the name of the preset of these sizes. Raises DataError if there is none."""
    embedding = shapes.get("class_embed.weight", ())
    width = embedding[1] if len(embedding) == 2 else None
    depth = len({name.split(".")[1] for name in shapes if name.startswith("encoder.")})
    for name in MODELS:
        values = model_values(name)
        if (values["width"], values["depth_encoder"]) == (width, depth):
            return name
    raise DataError(f"{path} matches no preset: its width is {width}, it has {depth} encoder blocks")
