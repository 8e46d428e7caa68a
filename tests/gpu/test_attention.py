"""Every backend on a GPU against dense in float64, forward and backward, and flash_attn where it is installed."""

from importlib.util import find_spec

import pytest
import torch

from tests.unit.conftest import unequal_layout
from xar_scale.config import ModelConfig
from xar_scale.model import attention
from xar_scale.model.attention import block_causal_attention
from xar_scale.model.entities import create_layout, kinds

HEAD_WIDTHS = [64, 80, 96, 128]
SIZES = dict(width=8, depth_encoder=1, depth_decoder=1, heads=1)
LAYOUTS = {kind: create_layout(ModelConfig(**SIZES, grid=(16, 16), entity=kind)) for kind in kinds()}
LAYOUTS["unequal"] = unequal_layout()
BF16, FP32, TF32 = 2e-2, 1e-5, 5e-3  # of the size of an output or gradient


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test counts towards PyTorch's limit."""
    torch._dynamo.reset()


def outputs(tensors, layout, first, backend):
    """Attention and its gradients, in float64 for comparison."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = block_causal_attention(*tensors, layout, first=first, backend=backend)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view_as(out).to(out.dtype)
    return [tensor.double() for tensor in (out, *torch.autograd.grad(out, tensors, gradient))]


def check(layout, backend, dtype, head_width, tolerance, device):
    generator = torch.Generator(device).manual_seed(0)
    for first in {0, layout.entities // 2}:
        q, k, v = torch.randn(3, 2, 3, layout.tokens, head_width, device=device, generator=generator).to(dtype)
        tensors = [q[:, :, layout.offsets[first] :], k, v]
        exact = outputs([tensor.double() for tensor in tensors], layout, first, "dense")
        for ours, reference in zip(outputs(tensors, layout, first, backend), exact, strict=True):
            assert (ours - reference).norm() < tolerance * reference.norm()


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
@pytest.mark.parametrize("backend", ["dense", "masked", "prefix", "flex", "flash"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "patch"])
def test_in_bf16(name, backend, head_width, device):
    check(LAYOUTS[name], backend, torch.bfloat16, head_width, BF16, device)


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
@pytest.mark.parametrize("backend", ["dense", "masked", "prefix", "flex"])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "patch"])
def test_in_float32_and_tf32(name, backend, head_width, device, matmul):
    check(LAYOUTS[name], backend, torch.float32, head_width, FP32 if matmul == "highest" else TF32, device)


@pytest.mark.parametrize("backend", ["masked", "prefix", "flex", "flash"])
def test_entities_of_one_token(backend, device):
    check(LAYOUTS["patch"], backend, torch.bfloat16, 64, BF16, device)


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs flash_attn")
@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_prefix_uses_flash_attn_in_bf16(head_width, device, monkeypatch):
    layout, calls = LAYOUTS["scale"], []
    flash = attention._flash_attn
    monkeypatch.setattr(attention, "_flash_attn", lambda *tensors, **settings: calls.append(1) or flash(*tensors, **settings))
    check(layout, "prefix", torch.bfloat16, head_width, BF16, device)
    assert len(calls) == layout.entities + layout.entities - layout.entities // 2


@pytest.mark.parametrize("backend", ["masked", "prefix"])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_one_entity_is_sampled_in_bf16(name, backend, device):
    """As in sampling: its queries alone, and the keys up to its own."""
    layout = LAYOUTS[name]
    generator = torch.Generator(device).manual_seed(0)
    for first in {0, layout.entities // 2, layout.entities - 1}:
        begin, end = layout.offsets[first : first + 2]
        q, k, v = torch.randn(3, 2, 3, end, 80, device=device, generator=generator).bfloat16()
        tensors = q[:, :, begin:], k, v
        exact = block_causal_attention(*(tensor.double() for tensor in tensors), layout, first=first, backend="dense")
        out = block_causal_attention(*tensors, layout, first=first, backend=backend)
        assert (out - exact).norm() < BF16 * exact.norm()
