"""Rotary positions."""

import torch
from torch.autograd import gradcheck

from tests.unit.conftest import nano_model, normal
from xar_scale.model.rope import BASE, apply_rotary, rotary_angles

COORDINATES = nano_model().layout.coordinates


def turn(x_BNTH, cos, sin):
    """Return queries and keys of equal values, rotated alike."""
    x_BTSNH = x_BNTH.transpose(1, 2)[:, :, None].expand(-1, -1, 2, -1, -1)
    turned = apply_rotary(x_BTSNH, cos, sin)
    assert torch.equal(turned[:, :, 0], turned[:, :, 1])
    return turned[:, :, 0].transpose(1, 2)


def rotary(coordinates, head_width):
    angles = rotary_angles(coordinates, head_width)
    return angles.cos(), angles.sin()


def test_rotary_rotates_complex_numbers():
    head_width, coordinates = 8, torch.tensor([[0.0, 0.0], [3.0, 1.0], [7.0, 15.0]])
    x = normal(0, 2, 1, 3, head_width)
    numbers = torch.view_as_complex(x.clone().unflatten(-1, (-1, 2)))
    for token, (row, column) in enumerate(coordinates.tolist()):
        # two pairs rotate with the row, two with the column, the second of each more slowly
        angles = torch.tensor([row, row * BASE**-0.5, column, column * BASE**-0.5], dtype=torch.float64)
        numbers[:, :, token] *= torch.polar(torch.ones(4, dtype=torch.float64), angles)
    expected = torch.view_as_real(numbers).flatten(-2)
    torch.testing.assert_close(turn(x, *rotary(coordinates, head_width)), expected, atol=1e-6, rtol=0)


def test_rotary_keeps_norms_and_leaves_the_origin():
    coordinates = torch.tensor([[0.0, 0.0], [3.0, 1.0], [15.0, 15.0]])
    x = normal(0, 2, 3, 3, 16)
    turned = turn(x, *rotary(coordinates, 16))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-6, rtol=0)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_rotary_scores_depend_on_the_difference_of_positions_only():
    q, k = normal(0, 1, 1, 1, 16), normal(1, 1, 1, 1, 16)

    def score(at_q, at_k):
        turned = [turn(x, *rotary(torch.tensor([at]), 16)) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    base = score((2.0, 5.0), (1.0, 9.0))
    torch.testing.assert_close(score((12.0, 6.0), (11.0, 10.0)), base, atol=1e-5, rtol=0)
    for other in ((3.0, 5.0), (2.0, 6.0), (1.0, 9.0)):
        assert (score(other, (1.0, 9.0)) - base).abs() > 1e-2


def test_rotary_computes_in_the_type_of_its_angles_and_returns_that_of_its_input():
    cos, sin = rotary(COORDINATES, 8)
    x = normal(0, 1, 1, 16, 8).bfloat16()
    turned = turn(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, turn(x.float(), cos, sin).bfloat16())


def test_rotary_gradients_match_finite_differences():
    cos, sin = (tensor.double() for tensor in rotary(COORDINATES[:5], 8))
    assert gradcheck(lambda x: turn(x, cos, sin), normal(0, 1, 2, 5, 8).requires_grad_())


def test_a_graph_s_formula_is_the_same(monkeypatch):
    cos, sin = rotary(COORDINATES, 8)
    x = normal(0, 2, 3, 16, 8)
    turned = turn(x, cos, sin)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(turn(x, cos, sin), turned, atol=1e-12, rtol=0)
