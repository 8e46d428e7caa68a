"""The parts of a block: norm, time embedding, gated MLP, attention, per-entity modulation."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_scale.config import AttentionBackend, KernelLibrary, ModelConfig
from xar_scale.model import apex
from xar_scale.model.aligned import NarrowingLinear, WideningLinear
from xar_scale.model.attention import block_causal_attention
from xar_scale.model.dropout import Dropout
from xar_scale.model.entities import EntityLayout
from xar_scale.model.kv_cache import LayerCache
from xar_scale.model.rope import apply_rotary

NORM_EPS = 1e-6
TIME_CHANNELS = 256
MAX_PERIOD = 10000.0


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with statistics in at least float32; ``affine``: with a learned weight."""

    def __init__(self, width: int, affine: bool) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.library: KernelLibrary = "torch"

    def forward(self, x: Tensor) -> Tensor:
        if self.library == "apex":
            normed = apex.rms_norm(x, self.width, NORM_EPS)
        else:
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            normed = F.rms_norm(exact, (self.width,), eps=NORM_EPS).type_as(x)
        return normed if self.weight is None else normed * self.weight


class TimeEmbedding(nn.Module):
    """Sinusoids of the quantised time (cosines first), then a two-layer MLP."""

    def __init__(self, width: int, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.fc1 = nn.Linear(TIME_CHANNELS, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t_BK: Tensor) -> Tensor:
        """Times in [0, 1], (B, K) -> (B, K, D)."""
        half = TIME_CHANNELS // 2
        frequencies = MAX_PERIOD ** (-torch.arange(half, device=t_BK.device, dtype=torch.float32) / half)
        angles = torch.floor(self.bins * t_BK.float())[..., None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(sinusoids)))


def mlp_width(config: ModelConfig) -> int:
    """Return the hidden channels of the gated MLP: two thirds of a plain MLP's, for the same number of parameters."""
    return int(config.width * config.mlp_ratio * 2 / 3)


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), with timm's two dropouts: on the product and on the output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = mlp_width(config)
        self.gate = WideningLinear(config.width, hidden)
        self.up = WideningLinear(config.width, hidden)
        self.down = NarrowingLinear(hidden, config.width)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.drop(F.gelu(self.gate(x)) * self.up(x))))


class Attention(nn.Module):
    """Multi-head block-causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, layout: EntityLayout) -> None:
        super().__init__()
        self.heads, self.head_width, self.dropout = config.heads, config.head_width, config.dropout
        self.layout = layout
        self.backend: AttentionBackend = "auto"
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.drop = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], first: int, cache: LayerCache | None) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, self.head_width))
        qk, v = qkv.split((2, 1), dim=2)
        q, k = apply_rotary(qk, *rotary).permute(2, 0, 3, 1, 4)  # each (B, N, T, H)
        (v,) = v.permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(self.layout.offsets[first], k, v)
        dropout = self.dropout if self.training else 0.0
        out = block_causal_attention(q, k, v, self.layout, first=first, backend=self.backend, dropout=dropout)
        return self.drop(self.proj(out.transpose(1, 2).flatten(2)))


def each_entity(
    layout: EntityLayout, first: int, change: Callable[..., Tensor], tokens_BTD: Sequence[Tensor], rows_BKD: Sequence[Tensor]
) -> Tensor:
    """Apply ``change(*tokens, *rows)`` to the tokens of each entity, from ``first`` on, and its rows of D values, broadcast.

    Rows are never repeated in memory for each token: entities of equal length become a dimension, others are processed one by
    one.
    """
    entities = rows_BKD[0].shape[1]
    lengths = layout.lengths[first : first + entities]
    if len(set(lengths)) == 1:
        tokens = [x.unflatten(1, (entities, -1)) for x in tokens_BTD]
        return change(*tokens, *(row[:, :, None] for row in rows_BKD)).flatten(1, 2)
    parts = enumerate(zip(*(x.split(lengths, dim=1) for x in tokens_BTD), strict=True))
    return torch.cat([change(*part, *(row[:, k : k + 1] for row in rows_BKD)) for k, part in parts], dim=1)


class Block(nn.Module):
    """Attention and MLP, each behind a norm, shifted, scaled and gated by its entity's condition (adaLN, DiT section 3.2)."""

    def __init__(self, config: ModelConfig, layout: EntityLayout) -> None:
        super().__init__()
        self.layout = layout
        self.norm = RMSNorm(config.width, affine=False)
        self.attn = Attention(config, layout)
        self.mlp = GatedMLP(config)
        self.ada = nn.Linear(config.width, 6 * config.width)

    def forward(
        self, x_BTD: Tensor, condition_BKD: Tensor, rotary: tuple[Tensor, Tensor], first: int, cache: LayerCache | None
    ) -> Tensor:
        rows = self.ada(F.silu(condition_BKD)).unflatten(-1, (6, -1)).unbind(2)
        gate1, gate2, scale1, scale2, shift1, shift2 = rows  # each (B, K, D)

        def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return each_entity(self.layout, first, lambda x, a, b: torch.addcmul(b, x, 1 + a), [self.norm(x)], [scale, shift])

        def plus_gated(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
            # not addcmul: under CUDA autocast it would make float32 copies of 16-bit tensors
            return each_entity(self.layout, first, lambda x, y, g: x + y * g, [x, change], [gate])

        x = plus_gated(x_BTD, self.attn(modulated(x_BTD, scale1, shift1), rotary, first, cache), gate1)
        return plus_gated(x, self.mlp(modulated(x, scale2, shift2)), gate2)
