"""What the tests of block-causal attention share: backends, layouts, inputs, and the naive sum."""

import torch

from tests.unit.conftest import normal, unequal_layout
from xar_scale.config import ModelConfig
from xar_scale.model.entities import create_layout

BACKENDS = ["dense", "masked", "prefix", "flex"]
LAYOUTS = {
    "equal": create_layout(ModelConfig(width=8, depth_encoder=1, depth_decoder=1, heads=1, grid=(4, 4), entity_size=2)),
    "unequal": unequal_layout(),
    "one entity": create_layout(ModelConfig(width=8, depth_encoder=1, depth_decoder=1, heads=1, grid=(2, 2), entity_size=2)),
}


def qkv(layout, first=0, last=None, dtype=torch.float64, head_width=4):
    """Queries of entities first to last, keys and values of entity 0 to last."""
    begin, end = layout.offsets[first], layout.offsets[layout.entities if last is None else last + 1]
    return [normal(seed, 2, 3, end, head_width).to(dtype)[:, :, start:] for seed, start in ((1, begin), (2, 0), (3, 0))]


def naive(q, k, v, layout, first):
    """Token by token, as in the paper."""
    entity = [number for number, length in enumerate(layout.lengths) for _ in range(length)]
    outputs = []
    for token in range(q.shape[2]):
        seen = [other for other in range(k.shape[2]) if entity[other] <= entity[layout.offsets[first] + token]]
        scores = (k[:, :, seen] @ q[:, :, token, :, None])[..., 0] / q.shape[-1] ** 0.5
        outputs.append((scores.softmax(-1)[..., None] * v[:, :, seen]).sum(2))
    return torch.stack(outputs, dim=2)
