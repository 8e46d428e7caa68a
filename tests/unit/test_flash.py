"""flash_attention against dense attention in float64. The kernels run on a GPU, or on a CPU in Triton's interpreter, which
needs a process started for it. The interpreter cannot multiply bfloat16, so a CPU tests float16 only."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.processes import ROOT, environment
from xar_scale.model import flash
from xar_scale.model.flash import BlockSizes, flash_attention
from xar_scale.model.flash_kernels import triton

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
here = pytest.mark.skipif(not (GPU or INTERPRETED), reason="runs where Triton interprets")
outside = pytest.mark.skipif(INTERPRETED, reason="runs where Triton does not interpret")
pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")

TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 3e-2}  # of outputs and gradients up to about 6: a few roundings
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
# Lengths of entities, and the first of them that has queries
LAYOUTS = {
    "cells": ((16, 16, 16, 16), 0),
    "unequal": ((1, 3, 2, 4), 0),
    "scales": ((1, 4, 16), 0),
    "single tokens": ((1,) * 37, 0),
    "odd": ((37, 20), 0),
    "one": ((37,), 0),
    "the last": ((1, 4, 16, 30), 3),
    "the later": ((5, 30, 3, 20), 1),
}


def cuts(queries, keys):
    return {name: {flash.WIDEST: BlockSizes(queries, keys, warps=4, stages=2, registers=255)} for name in flash.BLOCKS}


@outside
@pytest.mark.skipif(GPU, reason="they run here")
def test_the_tests_below_in_a_process_with_tritons_interpreter():
    kept = {name: value for name, value in environment().items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=kept | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout


def ends_of(lengths, first):
    """Return the end of each query's entity."""
    ends = torch.tensor(lengths).cumsum(0)[first:].repeat_interleave(torch.tensor(lengths[first:]))
    return ends.to(DEVICE, torch.int32)


def tensors(ends, head_width, dtype=torch.float16, memory="together", batch=1, heads=2):
    """Return q, k, v and a gradient of the output, laid out in memory as in some part of a model."""
    shape = batch, int(ends[-1]), heads, head_width
    generator = torch.Generator(DEVICE).manual_seed(0)
    drawn = torch.randn(4, *shape, device=DEVICE, generator=generator).to(dtype)
    if memory == "together":
        q, k, v = drawn[:3].permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 3, 1, 4)
        grad = drawn[3].transpose(1, 2)
    else:  # separate, each in another order, and the keys in a cache with spare capacity
        q, k, v, grad = drawn.transpose(2, 3)
        q, grad = q.contiguous(), grad.contiguous()
        k = torch.cat((k, k), dim=2)[:, :, : shape[1]]
    queries = slice(shape[1] - len(ends), None)
    return [x.detach().requires_grad_() for x in (q[:, :, queries], k, v)], grad[:, :, queries]


def mixed(x):
    """MurmurHash3's finaliser, of 32 bits in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def kept(seed, B, N, Tq, Tk, dropout):
    """The kernels' mask of a seed."""
    words = mixed(mixed(torch.arange(B * N * Tq, device=DEVICE) ^ seed[0].long()) ^ seed[1].long())
    bits = mixed((words[:, None] * (2 * torch.arange(Tk, device=DEVICE) + 1)) & 0xFFFFFFFF)
    bits = bits ^ (bits >> 16)  # the last step, which the kernels leave out
    return (((bits + 2**31) & 0xFFFFFFFF) - 2**31 >= int(dropout * 2**32) - 2**31).view(B, N, Tq, Tk)


def dense(inputs, grad, ends, dropout, mask):
    """Output and gradients in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    hidden = torch.arange(k.shape[2], device=DEVICE) >= ends[:, None]
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, float("-inf"))
    out = (scores.softmax(-1) * mask / (1 - dropout)) @ v
    return out, *torch.autograd.grad(out, (q, k, v), grad.double())


def fused(inputs, grad, ends, dropout):
    """Output and gradients of the kernels, and their mask."""
    torch.manual_seed(0)
    out, _, seed = torch.ops.xar_scale.flash_attention(*inputs, ends, dropout)
    (B, N, Tq, _), Tk = inputs[0].shape, inputs[1].shape[2]
    mask = kept(seed, B, N, Tq, Tk, dropout) if dropout else 1
    return [out, *torch.autograd.grad(out, inputs, grad)], mask


def check(ends, inputs, grad, dropout=0.0):
    ours, mask = fused(inputs, grad, ends, dropout)
    tolerance = TOLERANCE[grad.dtype]
    for one, exact in zip(ours, dense(inputs, grad, ends, dropout, mask), strict=True):
        assert one.dtype == grad.dtype and one.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(one.double(), exact, atol=tolerance, rtol=tolerance)


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "dropout"), [(16, 32, 0.3), (32, 16, 0.0)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_matches_dense_forward_and_backward(name, queries, keys, dropout, dtype, monkeypatch):
    """In many blocks: some visible to all of their queries, some to a few, some to none."""
    monkeypatch.setattr(flash, "BLOCKS", cuts(queries, keys))
    ends = ends_of(*LAYOUTS[name])
    check(ends, *tensors(ends, 16, dtype, heads=1), dropout)


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_width", "memory"), [(24, "apart"), (64, "together"), (80, "together"), (128, "apart")])
def test_every_head_width_matches_dense_forward_and_backward(head_width, memory, dtype):
    """With the default block sizes, several samples and heads."""
    ends = ends_of((1, 64, 6), 1)
    check(ends, *tensors(ends, head_width, dtype, memory, batch=2), 0.1)


@here
def test_a_gradient_may_have_any_strides():
    ends = ends_of((3, 20), 0)
    inputs, grad = tensors(ends, 24)
    for other in (
        grad[:1, :1, :1, :1].expand(grad.shape),
        grad.contiguous(),
        grad.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        check(ends, inputs, other)


@here
def test_dropout_drops_its_share_and_scales_up_the_rest():
    """Equal probabilities, whose values identify them."""
    T, dropout = 64, 0.1
    q, v = torch.zeros(8, 2, T, T, dtype=torch.float16, device=DEVICE), torch.eye(T, dtype=torch.float16, device=DEVICE)
    p = flash_attention(q, q, v.expand(8, 2, T, T), ends_of((T,), 0), dropout) * T
    torch.testing.assert_close(p.unique().tolist(), [0.0, 1 / 0.9], atol=1e-3, rtol=0)
    dropped = (p == 0).double()
    assert dropped.mean().item() == pytest.approx(dropout, abs=5e-3)  # four standard deviations
    for one, other in (
        (dropped[..., 1:], dropped[..., :-1]),
        (dropped[:, :, 1:], dropped[:, :, :-1]),
        (dropped[1:], dropped[:-1]),
    ):
        assert (one * other).mean().item() == pytest.approx(dropout**2, abs=2e-3)  # neighbours are dropped independently


@here
def test_dropout_uses_and_advances_the_generator():
    ends = ends_of((3, 20), 0)
    inputs, _ = tensors(ends, 16)
    torch.manual_seed(0)
    first, second = flash_attention(*inputs, ends, 0.5), flash_attention(*inputs, ends, 0.5)
    torch.manual_seed(0)
    assert torch.equal(flash_attention(*inputs, ends, 0.5), first) and not torch.equal(first, second)
    torch.manual_seed(0)
    flash_attention(*inputs, ends, 0.0)
    assert torch.equal(flash_attention(*inputs, ends, 0.5), first)  # without dropout nothing is drawn


@here
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_or_compiled_it_is_the_same(compiled):
    ends = ends_of((3, 20), 0)
    inputs, grad = tensors(ends, 16)

    def attend(*inputs):
        return flash_attention(*(x * 1.5 for x in inputs), ends, 0.3)

    graph = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for one in (attend, graph if compiled else lambda *inputs: checkpoint(attend, *inputs, use_reentrant=False)):
        torch.manual_seed(0)
        out = one(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


@here
def test_recomputed_in_a_graph_it_repeats_its_dropout():
    """The output is a sum of values: the gradient of each, times the value, is that of the output times the output."""
    ends = ends_of((3, 20), 0)
    (q, k, v), grad = tensors(ends, 16)

    def attend(v):
        return checkpoint(lambda v: flash_attention(q.detach(), k.detach(), v * 1.5, ends, 0.3), v, use_reentrant=False)

    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(v)
    (dv,) = torch.autograd.grad(out, v, grad)
    torch.testing.assert_close((dv.double() * v).sum(), (grad.double() * out).sum(), rtol=2e-3, atol=1e-2)


@here
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_passes_the_checks_of_custom_operations(dropout):
    ends = ends_of((1, 5, 20), 1)
    inputs, grad = tensors(ends, 24, memory="apart")
    given = [x.detach() for x in (grad, *inputs, ends, *torch.ops.xar_scale.flash_attention(*inputs, ends, dropout))]
    forward, backward = (getattr(torch.ops.xar_scale, name).default for name in ("flash_attention", "flash_attention_backward"))
    for operation, arguments in ((forward, given[1:5]), (backward, given)):
        with FakeTensorMode() as mode:
            expected = operation(*map(mode.from_tensor, arguments), dropout)
        for fake, real in zip(expected, operation(*arguments, dropout), strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    if not dropout:  # dropout draws anew at each call
        torch.library.opcheck(forward, (*inputs, ends, 0.0))
        torch.library.opcheck(backward, (*given, 0.0))


@outside
def test_it_can_be_imported_where_triton_is_not_installed():
    lines = "import sys", "sys.modules['triton'] = None", "import torch", "from xar_scale.model import flash"
    program = "; ".join([*lines, "print(flash.available(torch.device('cuda')))"])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.stdout.strip() == "False", done.stderr
