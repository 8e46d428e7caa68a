"""block_causal_attention: entity k sees entities 0 to k. One readable reference (dense), one fast twin (prefix)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xar_scale.model.entities import EntityLayout

Backend = Literal["dense", "prefix"]

# Shorter entities make more and smaller calls than their unmasked work saves (docs/benchmarks, measured on a CPU only)
MIN_PREFIX_LENGTH = 16


def block_causal_attention(
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTH: Tensor,
    layout: EntityLayout,
    *,
    first: int = 0,
    backend: Backend | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of whole entities from ``first`` on to themselves and all entities before them (paper section 3.3).

    q holds the queries of the entities fed; k and v the tokens of entity 0 up to the last one fed, so that a cache serves
    the ones before. Returns (B, N, T, H) as q. Scale is H^-0.5; ``dropout`` acts on the probabilities.
    """
    return {"dense": _dense, "prefix": _prefix}[backend or choose_backend(layout)](
        q_BNTH, k_BNTH, v_BNTH, layout, first, dropout
    )


def choose_backend(layout: EntityLayout) -> Backend:
    """The faster exact one: a call an entity where entities are long on average, one masked product where they are short."""
    return "prefix" if layout.tokens >= MIN_PREFIX_LENGTH * layout.entities else "dense"


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: EntityLayout, first: int, dropout: float) -> Tensor:
    """The reference: every score, a mask, a softmax."""
    begin, end = layout.offsets[first], k.shape[2]
    entity = layout.on(q.device).entity[:end]
    visible = entity <= entity[begin:, None]
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return F.dropout(probabilities, dropout, training=dropout > 0) @ v


def _prefix(q: Tensor, k: Tensor, v: Tensor, layout: EntityLayout, first: int, dropout: float) -> Tensor:
    """One unmasked call an entity over a growing prefix of keys: exact, and no masked score is ever computed.

    Each call is one fused kernel (FlashAttention where PyTorch has it). Four equal entities cost 62.5 % of the dense work.
    """
    outputs, fed = [], layout.offsets[first]
    for begin, end in zip(layout.offsets[first:], layout.offsets[first + 1 :], strict=False):
        if end > k.shape[2]:
            break
        query = q[:, :, begin - fed : end - fed]
        outputs.append(F.scaled_dot_product_attention(query, k[:, :, :end], v[:, :, :end], dropout_p=dropout))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
