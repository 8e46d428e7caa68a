"""The network's floating-point operations, exactly: a multiply-add counts as two; matrix products only, as is usual."""

from itertools import pairwise

from xar_scale.config import ModelConfig
from xar_scale.model.entities import create_layout
from xar_scale.model.layers import TIME_CHANNELS, mlp_width


def forward_flops(config: ModelConfig) -> int:
    """Return those of one image's forward pass: modulation and time per entity, attention by its mask, the rest per token."""
    layout, width = create_layout(config), config.width
    blocks = config.depth_encoder + config.depth_decoder
    per_token = blocks * (4 * width**2 + 3 * width * mlp_width(config)) + width**2 + 2 * width * config.channels
    per_entity = blocks * 6 * width**2 + TIME_CHANNELS * width + width**2
    scores = sum((end - begin) * end for begin, end in pairwise(layout.offsets))  # pairs of a query and a visible key
    return 2 * (layout.tokens * per_token + layout.entities * per_entity + blocks * 2 * scores * width)


def training_flops(config: ModelConfig) -> int:
    """Return those of one image forward and backward, without recomputation: the backward pass has two products for each."""
    return 3 * forward_flops(config)
