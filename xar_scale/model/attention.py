"""block_causal_attention: entity k attends to entities 0 to k. A readable reference (dense) and its fast twins."""

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xar_scale.config import AttentionBackend
from xar_scale.errors import ConfigError
from xar_scale.model import flash
from xar_scale.model.compiled import compile_static
from xar_scale.model.cpu import takes_cpu_path
from xar_scale.model.dropout import dropout
from xar_scale.model.entities import EntityLayout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["dense", "masked", "prefix", "flex", "flash"]

# On a CPU the calls for shorter entities cost more than the skipped masked work saves (docs/benchmarks)
MIN_PREFIX_LENGTH = 16
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_ATTN_HEAD_WIDTH = 256  # the widest that flash_attn supports
CUDNN_TILE = 128
_BUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FLEX_HEAD_WIDTH = 16  # the narrowest that FlexAttention's kernel supports


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
    """Attention of whole entities, from ``first`` on, to themselves and all entities before them (paper section 3.3).

    q holds the queries of the entities fed. k and v hold the tokens of entity 0 up to the last one fed: earlier ones come from
    a cache. Returns (B, N, T, H), like q. The scale is H^-0.5; ``dropout`` acts on the probabilities. Raises ConfigError if the
    named ``backend`` is not usable: there is no silent fallback, except that flash in 32 bits becomes masked.
    """
    kind = q_BNTH.device, q_BNTH.dtype, q_BNTH.shape[-1]
    chosen = choose_backend(layout, *kind, dropout=dropout, backward=q_BNTH.requires_grad, backend=backend)
    return _FUNCTIONS[chosen](q_BNTH, k_BNTH, v_BNTH, layout, first, dropout)


def choose_backend(
    layout: EntityLayout,
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    *,
    dropout: float,
    backward: bool,
    backend: AttentionBackend = "auto",
) -> Backend:
    """Return the named backend, or for ``auto`` the fastest one that always works (docs/benchmarks).

    - On a GPU: flash for training in 16 bits where it is available, else masked, one fused kernel for all entities. A single
      entity needs no mask: prefix.
    - On a CPU: prefix, one call per entity, where entities are long on average; dense, plain products, where they are short.

    Raises ConfigError with the reason if the named backend is not usable.
    """
    if backend == "auto" and device.type == "cuda":
        if backward and dtype in FLASH_DTYPES and flash.available(device) and flash.NARROWEST <= head_width <= flash.WIDEST:
            return "flash"
        return "masked" if layout.entities > 1 else "prefix"
    if backend == "auto":
        return "prefix" if layout.tokens >= MIN_PREFIX_LENGTH * layout.entities else "dense"
    if backend == "flex" and dropout > 0:
        raise ConfigError(f"attention flex has no dropout, model.dropout is {dropout}; use flash, masked, prefix or dense")
    if backend == "flex" and backward and device.type == "cpu":
        raise ConfigError("attention flex has no backward pass on a CPU; use masked, prefix or dense")
    if backend == "flex" and head_width < FLEX_HEAD_WIDTH and device.type == "cuda":
        raise ConfigError(f"attention flex takes heads of at least {FLEX_HEAD_WIDTH} channels, not {head_width}")
    if backend == "flash":
        if not torch.compiler.is_compiling() and not flash.available(device):
            raise ConfigError(f"attention flash needs {flash.REQUIREMENTS}; use masked, prefix or dense")
        if not flash.NARROWEST <= head_width <= flash.WIDEST:
            raise ConfigError(f"attention flash takes heads of {flash.NARROWEST} to {flash.WIDEST} channels, not {head_width}")
        if dtype not in FLASH_DTYPES:  # the guard may fall back to 32 bits in the middle of a run
            return "masked"
    return backend


def describe(backend: Backend, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """Return the backend and the kernel that it uses, for the log."""
    if backend == "dense":
        return "dense (a mask and a softmax)"
    if backend == "flex":
        return f"flex (PyTorch's FlexAttention, {'compiled' if device.type == 'cuda' else 'not compiled'})"
    if backend == "flash":
        return "flash (this project's, in Triton)"
    if backend == "masked":
        return "masked (PyTorch scaled_dot_product_attention)"
    kernel = "flash_attn" if _flash_attn_serves(device, dtype, head_width) else "PyTorch scaled_dot_product_attention"
    return f"prefix ({kernel})"


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: EntityLayout, first: int, dropout: float) -> Tensor:
    """The reference: all scores, a mask, a softmax."""
    return _attend(q, k, v, dropout, hidden=_hidden(layout, first, k))


def _hidden(layout: EntityLayout, first: int, k: Tensor) -> Tensor:
    """Return which keys (columns) a query (rows, from entity ``first`` on) does not attend to."""
    entity = layout.on(k.device).entity[: k.shape[2]]
    return entity > entity[layout.offsets[first] :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, hidden: Tensor | None = None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return dropout(scores.softmax(dim=-1), dropout_p) @ v


def _masked(q: Tensor, k: Tensor, v: Tensor, layout: EntityLayout, first: int, dropout: float) -> Tensor:
    """One call of PyTorch's fused kernel with a mask, on a GPU cuDNN's or one like FlashAttention-2 that supports masks.

    It computes the masked scores too, and is still faster than one call per entity, whose gradients of keys and values must be
    summed from slices.
    """
    last = layout.offsets.index(k.shape[2]) - 1
    visible = None if first == last else ~_hidden(layout, first, k)
    return _sdpa(q, k, v, visible, dropout)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """PyTorch's fused kernel, on a GPU cuDNN's. With gradients cuDNN's is used only if queries and keys fill whole tiles:
    otherwise its gradients were wrong, or NaN, on an H100 under torch 2.11 (pytorch#196678, cudnn-frontend#1072)."""
    whole = all(tensor.shape[2] % CUDNN_TILE == 0 for tensor in (q, k))
    if whole or q.device.type != "cuda" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
    with sdpa_kernel(_BUT_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)


def _prefix(q: Tensor, k: Tensor, v: Tensor, layout: EntityLayout, first: int, dropout: float) -> Tensor:
    """One unmasked call per entity over a growing prefix of keys: exact, and no masked score is computed.

    Each call is one fused kernel (FlashAttention-2 of flash_attn or PyTorch), on a CPU in training possibly three plain ones.
    Four equal entities cost 62.5 % of the dense work.
    """
    kernel = _kernel(q, dropout)
    outputs, end = [], layout.offsets[first]
    for q_entity in q.split(layout.lengths[first : layout.offsets.index(k.shape[2])], dim=2):
        end += q_entity.shape[2]
        outputs.append(kernel(q_entity, k[:, :, :end], v[:, :, :end], dropout_p=dropout))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _find_flash_attn() -> Callable[..., Any] | str | None:
    """Return flash_attn's function; None if the package is not installed; the reason if it is installed and unusable."""
    spec = find_spec("flash_attn")
    if spec is None or spec.origin is None:  # no origin: an empty folder of that name, left by related packages
        return None
    try:
        from flash_attn import flash_attn_func
    except Exception as error:  # a build for another torch fails with any of several kinds
        return f"flash_attn is installed and cannot be used: {' '.join(str(error).split())}"
    return flash_attn_func


# Looked up here, not at the first call, which may be inside a compiled graph, where imports fail
_FLASH_ATTN: Any = _find_flash_attn() if torch.cuda.is_available() else None


def _flash_attn_serves(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether flash_attn can be used. Raises ConfigError if it could be but is broken: there is no silent fallback."""
    if device.type != "cuda" or dtype not in FLASH_DTYPES or head_width > FLASH_ATTN_HEAD_WIDTH or _FLASH_ATTN is None:
        return False
    if isinstance(_FLASH_ATTN, str):
        raise ConfigError(f"{_FLASH_ATTN}; uninstall it or build it for this torch")
    return True


def _kernel(q: Tensor, dropout_p: float) -> Callable[..., Tensor]:
    if _flash_attn_serves(q.device, q.dtype, q.shape[-1]):
        return _flash_attn
    if takes_cpu_path(q) and (dropout_p > 0 or (q.requires_grad and q.dtype in FLASH_DTYPES)):
        return _attend  # PyTorch's fused kernel has no dropout on a CPU, and a slow backward pass in 16 bits
    return _sdpa


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """flash_attn's kernel, which takes (B, T, N, H)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return _FLASH_ATTN(q, k, v, dropout_p=dropout_p).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: EntityLayout, first: int, dropout: float) -> Tensor:
    """One kernel that skips fully masked blocks of scores, and masks only the partly masked ones."""
    ends = layout.on(q.device).ends[layout.offsets[first] : k.shape[2]]
    return flash.flash_attention(q, k, v, ends, dropout)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: EntityLayout, first: int, dropout: float) -> Tensor:
    """FlexAttention: one kernel that skips fully masked blocks of scores."""
    from torch.nn.attention.flex_attention import flex_attention  # imported here: it takes half a second

    place = layout, layout.offsets[first], k.shape[2], q.device
    if torch.compiler.is_compiling():  # a compiled graph makes its own mask and kernel
        return flex_attention(q, k, v, block_mask=_block_mask(*place))
    mask = _known_block_mask(*place)
    if q.device.type == "cpu":
        return flex_attention(q, k, v, block_mask=mask)
    return _compiled_flex()(q, k, v, block_mask=mask)


def _block_mask(layout: EntityLayout, begin: int, end: int, device: torch.device) -> "BlockMask":
    """Return the block mask of queries ``begin`` to ``end`` and keys 0 to ``end``."""
    from torch.nn.attention.flex_attention import create_block_mask

    entity = layout.on(device).entity

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return entity[begin + query] >= entity[key]

    return create_block_mask(visible, None, None, end - begin, end, device=str(device))


_known_block_mask = lru_cache(maxsize=128)(_block_mask)


@cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention compiled: uncompiled it computes all scores. Each mask and batch size has its own graph."""
    from torch.nn.attention.flex_attention import flex_attention

    return compile_static(flex_attention, fullgraph=True)


_FUNCTIONS = {"dense": _dense, "masked": _masked, "prefix": _prefix, "flex": _flex, "flash": _flash}
