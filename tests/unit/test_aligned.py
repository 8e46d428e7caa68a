"""Products padded with zero channels: the same function. CPU tensors emulate a GPU's."""

import copy

import pytest
import torch
from torch import nn

from tests.unit.conftest import normal
from xar_scale.config import ModelConfig
from xar_scale.model.aligned import WideningLinear, mark_weights_gathered
from xar_scale.model.cpu import emulate
from xar_scale.model.layers import GatedMLP

HIDDEN = 53  # of 20 channels, also no multiple of 8


@pytest.fixture
def mlp():
    return GatedMLP(ModelConfig(width=20, depth_encoder=1, depth_decoder=1, heads=1, dropout=0.2)).eval()


def results(mlp, x):
    """The output, and the gradients of input and weights."""
    mlp.zero_grad()
    x = x.clone().requires_grad_()
    out = mlp(x)
    out.backward(normal(1, *out.shape, dtype=out.dtype))
    return [out, x.grad, *(parameter.grad for parameter in mlp.parameters())]


def test_hidden_channels_up_to_a_multiple_of_8_are_zero(mlp):
    x = normal(0, 2, 3, 20, dtype=torch.float32)
    assert mlp.gate.out_features == HIDDEN and mlp.gate(x).shape == (2, 3, HIDDEN)
    with emulate(gpu=True, graph=False):
        hidden = mlp.gate(x)
    assert hidden.shape == (2, 3, 56) and (hidden[..., HIDDEN:] == 0).all()
    torch.testing.assert_close(hidden[..., :HIDDEN], mlp.gate(x))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_mlp_is_the_same_function_with_the_same_gradients(mlp, gathered, compiled):
    mlp, x = mlp.double(), normal(0, 2, 3, 20)
    expected = results(mlp, x)
    if gathered:
        mark_weights_gathered(mlp)
    if compiled:
        mlp.compile(backend="aot_eager", fullgraph=True)
    with emulate(gpu=True, graph=False):
        found = results(mlp, x)
    assert found[0].shape == x.shape
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("gathered", [False, True])
def test_under_autocast_it_computes_in_16_bits_as_linear_does(mlp, gathered):
    x = normal(0, 64, 20, dtype=torch.float32)
    if gathered:
        mark_weights_gathered(mlp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = results(mlp, x)
        with emulate(gpu=True, graph=False):
            found = results(mlp, x)
    assert found[0].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()


def test_no_copy_of_the_weights_is_kept_for_the_backward_pass(mlp):
    """Engines that shard weights free them after a block and gather them again."""
    with emulate(gpu=True, graph=False):
        out = mlp.gate(normal(0, 2, 20, dtype=torch.float32))
    kept = out.grad_fn.saved_tensors
    assert any(tensor.data_ptr() == mlp.gate.weight.data_ptr() for tensor in kept)
    assert {tensor.shape for tensor in kept} == {(HIDDEN, 20), (2, 20)}


@pytest.mark.parametrize("gathered", [False, True])
def test_under_autocast_the_weight_that_is_kept_is_the_one_an_engine_gathers(mlp, gathered):
    """A copy in 16 bits would be kept whole on each rank from the forward to the backward pass."""
    if gathered:
        mark_weights_gathered(mlp)
    with emulate(gpu=True, graph=False), torch.autocast("cpu", dtype=torch.bfloat16):
        out = mlp.gate(normal(0, 2, 20, dtype=torch.float32))
    (kept,) = (tensor for tensor in out.grad_fn.saved_tensors if tensor.shape == (HIDDEN, 20))
    assert (kept.data_ptr() == mlp.gate.weight.data_ptr()) == gathered


def test_multiples_of_8_are_not_padded():
    layer = WideningLinear(20, 48)
    plain = nn.Linear(20, 48)
    plain.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = normal(0, 2, 20, dtype=torch.float32)
    with emulate(gpu=True, graph=False):
        assert torch.equal(layer(x), plain(x)) and layer(x).grad_fn.name() == plain(x).grad_fn.name()
