"""Dropout on a CPU, held to what PyTorch's own does."""

import pytest
import torch
import torch.nn.functional as F

from xar_scale.model.dropout import dropout


@pytest.mark.parametrize("shape", [(1_000_003,), (101, 9901)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_its_share_is_zero_and_the_rest_grows(shape, p):
    torch.manual_seed(0)
    dropped = dropout(torch.ones(shape, dtype=torch.float64), p)
    assert dropped.shape == shape
    assert (dropped == 0).double().mean().item() == pytest.approx(p, abs=2e-3)  # four standard deviations
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 1 / (1 - p)], dtype=torch.float64))


def test_neighbours_are_dropped_independently():
    """Of the four values whose bits are drawn at once, all sixteen ways come as often as they should."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(400_000), 0.25) > 0).view(-1, 4)
    ways = torch.bincount((kept * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16) / len(kept)
    number = torch.arange(16)[:, None].bitwise_and(torch.tensor([1, 2, 4, 8])).ne(0).sum(1)
    torch.testing.assert_close(ways, 0.75**number * 0.25 ** (4 - number), atol=4e-3, rtol=0)


def test_its_gradient_passes_where_the_value_did():
    x = torch.full((1000,), 2.0, requires_grad=True)
    torch.manual_seed(0)
    dropped = dropout(x, 0.3)
    dropped.sum().backward()
    assert torch.equal(x.grad * 2, dropped)


def test_it_follows_the_generator_and_moves_it():
    x = torch.ones(64)
    torch.manual_seed(0)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.5), first) and not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_none_and_all(p):
    x = torch.randn(64)
    assert torch.equal(dropout(x, p), F.dropout(x, p))
