"""Dropout on a CPU and in compiled graphs, compared with PyTorch's own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from tests.unit.conftest import loss_of, nano_model
from xar_scale.model import dropout as dropout_module
from xar_scale.model.dropout import _hashed, _seed
from xar_scale.model.dropout import dropout as plain
from xar_scale.model.recompute import apply_recompute


@pytest.fixture(params=["plain", "in a graph"])
def dropout(request):
    torch._dynamo.reset()
    return plain if request.param == "plain" else torch.compile(plain, backend="eager", dynamic=False)


@pytest.mark.parametrize("shape", [(1_000_003,), (101, 9901)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_its_share_is_zero_and_the_rest_is_scaled_up(shape, p, dropout):
    torch.manual_seed(0)
    dropped = dropout(torch.ones(shape, dtype=torch.float64), p)
    assert dropped.shape == shape
    assert (dropped == 0).double().mean().item() == pytest.approx(p, abs=2e-3)  # four standard deviations
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 1 / (1 - p)], dtype=torch.float64))


@pytest.mark.parametrize("apart", [1, 2, 64, 1024, 65536])
def test_values_are_dropped_independently(apart, dropout):
    """For four values, whose bits may be drawn at once, all sixteen outcomes are as frequent as they should be."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(4 * 65536 * 2), 0.25) > 0).view(-1, 4, apart).transpose(1, 2).reshape(-1, 4)
    ways = torch.bincount((kept * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16) / len(kept)
    number = torch.arange(16)[:, None].bitwise_and(torch.tensor([1, 2, 4, 8])).ne(0).sum(1)
    torch.testing.assert_close(ways, 0.75**number * 0.25 ** (4 - number), atol=4e-3, rtol=0)


def test_calls_are_independent(dropout):
    torch.manual_seed(0)
    first, second = (dropout(torch.ones(500_000), 0.25) > 0 for _ in range(2))
    assert (first & second).double().mean().item() == pytest.approx(0.75**2, abs=3e-3)


def test_two_of_one_graph_are_independent():
    torch._dynamo.reset()
    twice = torch.compile(lambda x: (plain(x, 0.25), plain(x, 0.25)), backend="aot_eager_decomp_partition")
    first, second = twice(torch.ones(500_000, requires_grad=True))
    assert ((first > 0) & (second > 0)).double().mean().item() == pytest.approx(0.75**2, abs=3e-3)


def test_two_equal_seed_operations_of_one_graph_draw_twice():
    """A graph merges two equal operations, except those that draw."""
    torch._dynamo.reset()
    twice = torch.compile(lambda x, like: (x * _seed(like), x * _seed(like)), backend="aot_eager_decomp_partition")
    first, second = twice(torch.ones(2, requires_grad=True), torch.empty(0))
    assert not torch.equal(first, second)


def test_masks_of_seeds_that_differ_in_one_bit_are_independent(monkeypatch):
    """At the same index, and at the index that differs in that bit."""
    masks = []
    for words in ((7, 9), (7, 8)):
        monkeypatch.setattr(dropout_module, "_seed", lambda like, words=words: torch.tensor(words, dtype=torch.int32))
        masks.append(_hashed(torch.ones(500_000), 0.25) > 0)
    first, second = masks
    for other in (second, second.view(-1, 2).flip(1).flatten()):
        assert (first & other).double().mean().item() == pytest.approx(0.75**2, abs=3e-3)


def test_its_gradient_passes_where_the_value_did(dropout):
    x = torch.full((1000,), 2.0, requires_grad=True)
    torch.manual_seed(0)
    dropped = dropout(x, 0.3)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad * 2, dropped.detach())


def test_it_uses_and_advances_the_generator(dropout):
    x = torch.ones(64)
    torch.manual_seed(0)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.5), first) and not torch.equal(first, second)


def test_a_graph_keeps_no_mask():
    """The forward pass saves the seed for the backward pass, and otherwise only what it would without dropout."""
    kept = []

    def look(graph, _inputs):
        (output,) = graph.graph.find_nodes(op="output")
        kept.append(sorted(node.meta["val"].numel() for node in output.args[0]))
        return graph

    def work(x, w):
        return plain(x.sin(), 0.1) @ w

    backend = aot_autograd(
        fw_compiler=look, bw_compiler=lambda graph, _: graph, partition_fn=min_cut_rematerialization_partition
    )
    torch._dynamo.reset()
    torch.compile(work, backend=backend)(torch.randn(64, 32, requires_grad=True), torch.randn(32, 8, requires_grad=True))
    # the product; the seed; both inputs, and what was multiplied
    assert kept == [[2, 32 * 8, 64 * 8, 64 * 32, 64 * 32]]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_graphs_repeat_their_dropout(mode, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    gradients = []
    for each in ("none", mode):
        torch._dynamo.reset()
        model = nano_model(dropout=0.5).train()
        apply_recompute(model.blocks, each, compiled=True)
        torch.manual_seed(1)
        loss_of(model).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_none_and_all(p, dropout):
    x = torch.randn(64)
    assert torch.equal(dropout(x, p), F.dropout(x, p))
