"""Activation checkpointing of blocks: what the backward pass finds in memory and what it recomputes."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from xar_scale.config import Recompute
from xar_scale.model import dropout, flash  # noqa: F401  (they define the custom operations below)
from xar_scale.model.compiled import compile_static
from xar_scale.model.cpu import in_graph

_aten = torch.ops.aten
# Matrix products and attention: most of a block's time, little of its memory. flash_attn's kernel and FlexAttention are
# recomputed.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.xar_scale.flash_attention.default,
    torch.ops.xar_scale.dropout_seed.default,  # a second draw would differ
}


def apply_recompute(blocks: Iterable[nn.Module], mode: Recompute, *, compiled: bool = False) -> None:
    """Make the backward pass of each block recompute its forward: all of it ("full"), all but matrix products and attention
    ("selective"), or all of it from an input kept in host memory, pinned on a GPU ("offload"). Dropout is replayed.

    ``compiled``: each block's forward is compiled, into one graph shared by all blocks. The graph is inside the recomputation,
    but around it for "selective", which selects operations. Hooks on a block (of engines and observers) stay outside the graph.
    """
    for block in blocks:
        if compiled and mode != "selective":
            block.forward = compile_static(block.forward)
        if mode != "none":
            block.forward = partial(_recomputed, block.forward, mode)
        if compiled and mode == "selective":
            block.forward = compile_static(block.forward)


def _recomputed(forward: Callable[..., Any], mode: Recompute, *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    contexts: dict[str, Any] = {}
    if mode == "selective":
        contexts["context_fn"] = _contexts_in_graph if in_graph() else _contexts
    pinned = arguments[0].device.type == "cuda"
    with save_on_cpu(pin_memory=pinned) if mode == "offload" else nullcontext():
        return checkpoint(forward, *arguments, use_reentrant=False, **contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _contexts_in_graph() -> Any:
    return create_selective_checkpoint_contexts(_policy_in_graph)


def _policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    kept = operation in _KEPT and not _draws(operation, arguments, keywords)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _policy_in_graph(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Keep attention also where it draws dropout: whatever draws in a graph is kept, so no mask depends on the order of draws.
    On a GPU a graph that recomputed it would draw from generators of its own, which no seed reaches (torch 2.11 to 2.14)."""
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operation: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether the operation draws dropout inside. Such an operation is recomputed: skipping it would not advance the generator,
    and everything that draws after it in the block would draw another mask than in the forward pass."""
    names = [argument.name for argument in operation._schema.arguments]
    return bool((dict(zip(names, arguments, strict=False)) | keywords).get("dropout_p", 0.0))
