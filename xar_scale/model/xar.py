"""The xAR network: velocity of every noisy entity, given itself, the noisy ones before it, its time and the class."""

from typing import Any

import torch
from torch import Tensor, nn

from xar_scale import rng
from xar_scale.config import ModelConfig, validated
from xar_scale.errors import ConfigError
from xar_scale.model.entities import create_layout
from xar_scale.model.kv_cache import KVCache
from xar_scale.model.layers import Block, RMSNorm, TimeEmbedding
from xar_scale.model.rope import rotary_angles
from xar_scale.presets import model_values


class XAR(nn.Module):
    """xAR (Ren et al., 2025), section 3: an encoder and a decoder of the same width, adaLN by time and class per entity."""

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = layout = create_layout(config)
        width, tokens = config.width, layout.tokens
        self.class_embed = nn.Embedding(config.classes + 1, width)
        self.time_embed = TimeEmbedding(width, config.time_bins)
        self.in_proj = nn.Linear(config.channels, width)
        self.encoder_pos = nn.Parameter(torch.empty(1, tokens, width))
        self.in_norm = RMSNorm(width, affine=True)
        self.encoder = nn.ModuleList(Block(config, layout, layer) for layer in range(config.depth_encoder))
        self.encoder_norm = RMSNorm(width, affine=True)
        self.mid_proj = nn.Linear(width, width)
        self.decoder_pos = nn.Parameter(torch.empty(1, tokens, width))
        self.decoder = nn.ModuleList(
            Block(config, layout, config.depth_encoder + layer) for layer in range(config.depth_decoder)
        )
        self.decoder_norm = RMSNorm(width, affine=True)
        self.out_proj = nn.Linear(width, config.channels)
        angles = rotary_angles(layout.coordinates, config.head_width)
        self.register_buffer("rotary_cos", angles.cos(), persistent=False)
        self.register_buffer("rotary_sin", angles.sin(), persistent=False)

    @property
    def null_class(self) -> int:
        """The label of no class, learned by label drop and used for guidance."""
        return self.config.classes

    def forward(self, x_BTC: Tensor, t_BK: Tensor, labels_B: Tensor, first: int = 0, cache: KVCache | None = None) -> Tensor:
        """Velocity (B, T, C) of noisy tokens x (B, T, C), entity-major, at times t (B, K) in [0, 1].

        ``first``: the index of the first entity fed; what comes before it is read from ``cache``.
        """
        tokens = slice(self.layout.offsets[first], self.layout.offsets[first + t_BK.shape[1]])
        assert x_BTC.shape[1] == tokens.stop - tokens.start, "tokens and times name different entities"
        condition = self.class_embed(labels_B)[:, None] + self.time_embed(t_BK)
        rotary = self.rotary_cos[tokens], self.rotary_sin[tokens]

        x = self.in_norm(self.in_proj(x_BTC) + self.encoder_pos[:, tokens])
        for block in self.encoder:
            x = block(x, condition, rotary, first, cache)
        x = self.mid_proj(self.encoder_norm(x)) + self.decoder_pos[:, tokens]
        for block in self.decoder:
            x = block(x, condition, rotary, first, cache)
        return self.out_proj(self.decoder_norm(x))

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache for sampling ``batch`` sequences, of the parameters' device and dtype."""
        config, like = self.config, self.in_proj.weight
        layers = config.depth_encoder + config.depth_decoder
        return KVCache(layers, batch, config.heads, self.layout.tokens, config.head_width, device=like.device, dtype=like.dtype)


@torch.no_grad()
def init_weights(model: XAR, seed: int) -> None:
    """The published initialisation: Xavier uniform for every Linear, biases 0, embeddings and positions normal 0.02.

    Every parameter has a generator of its own, keyed by its name, so the order of construction does not matter.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        generator = rng.torch_generator(seed, f"init/{name}")
        if name in linear:
            nn.init.xavier_uniform_(parameter, generator=generator)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02, generator=generator)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)


def create_model(name: str, seed: int = 0, **changes: Any) -> XAR:
    """A freshly initialised preset, e.g. ``create_model("xar_h", entity="cell")``; ``changes`` are ModelConfig fields.

    Raises UsageError for an unknown name, ConfigError for fields that do not exist or fit.
    """
    model = XAR(validated(ModelConfig, {**model_values(name), **changes}, ConfigError))
    init_weights(model, seed)
    return model
