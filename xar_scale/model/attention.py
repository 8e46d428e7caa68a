"""block_causal_attention: entity k sees entities 0 to k. One readable reference (dense), two fast twins (prefix, flex)."""

from functools import cache
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from xar_scale.config import AttentionBackend
from xar_scale.errors import ConfigError
from xar_scale.model.entities import EntityLayout

Backend = Literal["dense", "prefix", "flex"]

# Shorter entities make more and smaller calls than their unmasked work saves (docs/benchmarks, measured on a CPU only)
MIN_PREFIX_LENGTH = 16
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_HEAD_WIDTH = 256  # the widest that FlashAttention-2 takes


def block_causal_attention(
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTH: Tensor,
    layout: EntityLayout,
    *,
    first: int = 0,
    backend: AttentionBackend = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Attention of whole entities from ``first`` on to themselves and all entities before them (paper section 3.3).

    q holds the queries of the entities fed; k and v the tokens of entity 0 up to the last one fed, so that a cache serves
    the ones before. Returns (B, N, T, H) as q. Scale is H^-0.5; ``dropout`` acts on the probabilities. Raises ConfigError
    where ``backend`` is named and cannot serve: nothing falls back in silence.
    """
    backend = choose_backend(layout, q_BNTH.device, dropout, q_BNTH.requires_grad, backend)
    return _FUNCTIONS[backend](q_BNTH, k_BNTH, v_BNTH, layout, first, dropout)


def choose_backend(
    layout: EntityLayout, device: torch.device, dropout: float, backward: bool, backend: AttentionBackend = "auto"
) -> Backend:
    """The one named, or of the two that serve everywhere the faster: prefix, a call an entity, where entities are long on
    average, and dense, one masked product, where they are short. Raises ConfigError with the reason against the one named.
    """
    if backend == "auto":
        return "prefix" if layout.tokens >= MIN_PREFIX_LENGTH * layout.entities else "dense"
    if backend == "flex" and dropout > 0:
        raise ConfigError(f"attention flex has no dropout, model.dropout is {dropout}; use prefix or dense")
    if backend == "flex" and backward and device.type == "cpu":
        raise ConfigError("attention flex has no backward pass on a CPU; use prefix or dense")
    return backend


def describe(backend: Backend, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """The backend and whose kernel it runs on, for the log."""
    if backend == "dense":
        return "dense (a mask and a softmax)"
    if backend == "flex":
        return f"flex (PyTorch's FlexAttention, {'compiled' if device.type == 'cuda' else 'not compiled'})"
    if _flash_serves(device, dtype, head_width):
        return f"prefix (flash_attn {version('flash_attn')})"
    return "prefix (PyTorch's scaled_dot_product_attention)"


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

    Each call is one fused kernel (FlashAttention-2 of flash_attn or PyTorch). Four equal entities cost 62.5 % of the dense
    work.
    """
    kernel = _flash if _flash_serves(q.device, q.dtype, q.shape[-1]) else F.scaled_dot_product_attention
    outputs, fed = [], layout.offsets[first]
    for begin, end in zip(layout.offsets[first:], layout.offsets[first + 1 :], strict=False):
        if end > k.shape[2]:
            break
        outputs.append(kernel(q[:, :, begin - fed : end - fed], k[:, :, :end], v[:, :, :end], dropout_p=dropout))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _flash_serves(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    fits = device.type == "cuda" and dtype in FLASH_DTYPES and head_width <= FLASH_HEAD_WIDTH
    return fits and _flash_attn() is not None


@cache
def _flash_attn() -> Any:
    """The flash_attn package, or None where it is not installed. One that is installed and broken raises ImportError."""
    try:
        return __import__("flash_attn")
    except ModuleNotFoundError:
        return None


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """flash_attn's kernel, which wants (B, T, N, H)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return _flash_attn().flash_attn_func(q, k, v, dropout_p=dropout_p).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: EntityLayout, first: int, dropout: float) -> Tensor:
    """FlexAttention: one kernel that skips the blocks of scores which no query sees."""
    place = layout, layout.offsets[first], k.shape[2], q.device
    if torch.compiler.is_compiling():  # a graph makes its own mask and its own kernel
        return flex_attention(q, k, v, block_mask=_block_mask(*place))
    kernel = flex_attention if q.device.type == "cpu" else _compiled_flex()
    return kernel(q, k, v, block_mask=_known_block_mask(*place))


def _block_mask(layout: EntityLayout, begin: int, end: int, device: torch.device) -> BlockMask:
    """Of queries ``begin`` to ``end`` and keys 0 to ``end``."""
    entity = layout.on(device).entity

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return entity[begin + query] >= entity[key]

    return create_block_mask(visible, None, None, end - begin, end, device=str(device))


_known_block_mask = cache(_block_mask)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)  # uncompiled it is dense and slow


_FUNCTIONS = {"dense": _dense, "prefix": _prefix, "flex": _flex}
