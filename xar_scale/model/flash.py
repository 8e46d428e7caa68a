"""flash_attention: block-causal attention as one fused Triton kernel forward and two backward (FlashAttention-2, Dao, 2023).

Here is where the kernels run, how they are launched, and the custom operations that autograd and torch.compile see.
"""

import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xar_scale.model.flash_kernels import KERNELS, triton

NARROWEST, WIDEST = 16, 128  # channels of a head


class BlockSizes(NamedTuple):
    """A kernel's launch parameters: tokens per block of queries and of keys, warps per program, pipeline stages, and the
    maximum registers per thread, which decide how many programs share a multiprocessor."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int


# By kernel and by the widest head that the sizes serve, as measured (docs/benchmarks/2026-11-27-h200.md). 64 queries are one
# entity of the published model, in which nothing is masked. With three programs of 4 warps on a multiprocessor a thread has 168
# registers, with two it has 255
BLOCKS = {
    "forward": {128: BlockSizes(64, 64, 4, 2, 168)},
    "queries": {96: BlockSizes(64, 64, 4, 2, 168), 128: BlockSizes(64, 32, 4, 2, 168)},
    "keys": {96: BlockSizes(32, 64, 4, 2, 168), 128: BlockSizes(32, 64, 4, 2, 255)},
}
REQUIREMENTS = "Triton, a C compiler, Python's headers and an NVIDIA GPU of compute capability 8.0 or later"


def available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``. A CUDA device on a machine without GPUs counts as a suitable one. Inside a
    compiled graph, which cannot check, the answer is the last one from outside, or False if there is none."""
    if device.type != "cuda":
        return False
    if torch.compiler.is_compiling():
        return _found.get(device.index or 0, False)
    there = torch.cuda.is_available()
    index = torch.cuda.current_device() if device.index is None and there else device.index or 0
    new = not there or torch.cuda.get_device_capability(device) >= (8, 0)
    _found[index] = triton is not None and torch.version.hip is None and _builds() and new
    return _found[index]


_found: dict[int, bool] = {}


@cache
def _builds() -> bool:
    """Whether Triton can build its kernel launcher, a C extension module."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does, for Debian
    headers = Path(sysconfig.get_path("include", scheme), "Python.h")
    return headers.exists() and bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def flash_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, ends_T: Tensor, dropout: float) -> Tensor:
    """Attention of query t to the keys before ``ends_T[t]`` (int32, non-decreasing, at least 1).

    q, k and v have one 16-bit dtype and any strides, but the last stride is 1. Returns (B, N, T, H), like q, laid out as (B, T,
    N, H) in memory, as are the gradients. The scale is H^-0.5; ``dropout`` acts on the probabilities, drawn from the device's
    generator.
    """
    return _attention(q_BNTH, k_BNTH, v_BNTH, ends_T, dropout)[0]


def block_sizes(name: str, head_width: int) -> BlockSizes:
    return BLOCKS[name][min(widest for widest in BLOCKS[name] if widest >= head_width)]


def constants(head_width: int, cut: BlockSizes, *, dropout: bool) -> dict[str, int]:
    """Return the constants that a kernel is compiled for."""
    main = 2 ** (head_width.bit_length() - 1)
    rest = max(NARROWEST, triton.next_power_of_2(head_width - main)) if main < head_width else 0
    sizes = {"H": head_width, "MAIN": main, "REST": rest, "QUERIES": cut.queries, "KEYS": cut.keys}
    return {**sizes, "DROPOUT": dropout}


def _launch(name: str, tensors: tuple[Tensor, ...], strided: tuple[Tensor, ...], dropout_p: float) -> None:
    """Launch a kernel over all samples and heads, with ``tensors`` and the strides of ``strided``, (B, N, T, H), q and k
    first."""
    (B, N, Tq, H), Tk = strided[0].shape, strided[1].shape[2]
    cut = block_sizes(name, H)
    blocks = triton.cdiv(Tk, cut.keys) if name == "keys" else triton.cdiv(Tq, cut.queries)
    with torch.cuda.device_of(strided[0]):
        KERNELS[name][(B * N * blocks,)](
            *tensors,
            *(stride for tensor in strided for stride in tensor.stride()[:3]),
            *(N, Tq, Tk),
            *(H**-0.5, int(dropout_p * 2**32) - 2**31, 1 / (1 - dropout_p)),
            **constants(H, cut, dropout=dropout_p > 0),
            num_warps=cut.warps,
            num_stages=cut.stages,
            maxnreg=cut.registers,
        )


def _empty(like_BNTH: Tensor) -> Tensor:
    """Return an empty tensor, laid out as (B, T, N, H) in memory, with the heads of a token adjacent."""
    B, N, T, H = like_BNTH.shape
    return like_BNTH.new_empty(B, T, N, H).transpose(1, 2)


# The tag makes a graph draw anew for each call, and draw the same again where it recomputes one
@torch.library.custom_op("xar_scale::flash_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, log2 of the sums of exponentials (B, N, T), and the seed of dropout."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16), (q.dtype, k.dtype, v.dtype)
    assert NARROWEST <= q.shape[-1] <= WIDEST, q.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, (q.stride(), k.stride(), v.stride())
    assert ends.dtype == torch.int32 and ends.shape == q.shape[2:3] and ends.is_contiguous(), (ends.dtype, ends.shape)
    assert 0 <= dropout_p < 1, dropout_p
    out, lse, seed = _attention_fake(q, k, v, ends, dropout_p)
    if dropout_p > 0:
        seed.random_()  # 31 bits
    _launch("forward", (q, k, v, ends, seed, out, lse), (q, k, v), dropout_p)
    return out, lse, seed


@_attention.register_fake
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return _empty(q), lse, q.new_empty(2 if dropout_p > 0 else 0, dtype=torch.int32)


@torch.library.custom_op("xar_scale::flash_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    delta, words = torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int32)
    # the order matters: the first kernel writes delta and words, which the second reads
    _launch("queries", (q, k, v, ends, seed, grad, out, lse, delta, words, dq), (q, k, v, grad, out), dropout_p)
    _launch("keys", (q, k, v, ends, grad, lse, delta, words, dk, dv), (q, k, v, grad), dropout_p)
    return dq, dk, dv


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # no zero gradients for lse and the seed


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(grad, *ctx.saved_tensors, ctx.dropout_p), None, None)


_attention.register_autograd(_differentiate, setup_context=_save)
