"""The count of operations against PyTorch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.conftest import with_backend
from xar_scale.config import ModelConfig
from xar_scale.model.entities import kinds
from xar_scale.model.flops import forward_flops, training_flops
from xar_scale.model.xar import XAR
from xar_scale.presets import MODELS, model_values


def counted(config: ModelConfig, backward: bool) -> int:
    """Return PyTorch's count for one image, without computing it: prefix calls, each decomposed into its two products."""
    with torch.device("meta"):
        model = with_backend(XAR(config).to("meta"), "prefix")
        layout = model.layout
        x = torch.empty(1, layout.tokens, config.channels, requires_grad=True)
        t, labels = torch.empty(1, layout.entities), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = model(x, t, labels)
            if backward:
                out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_is_counted_exactly(kind):
    config = ModelConfig(width=64, depth_encoder=2, depth_decoder=1, heads=4, channels=4, grid=(8, 8), entity=kind)
    assert forward_flops(config) == counted(config, backward=False)


@pytest.mark.parametrize("preset", MODELS)
def test_every_preset_is_counted_exactly(preset):
    config = ModelConfig(**model_values(preset))
    assert forward_flops(config) == counted(config, backward=False)


def test_a_backward_pass_is_two_forward_passes():
    config = ModelConfig(width=64, depth_encoder=2, depth_decoder=1, heads=4)
    # PyTorch skips the gradient of what needs none: the sinusoids of the time embedding's first layer
    first_layer = 2 * 4 * 256 * 64
    assert training_flops(config) - first_layer == counted(config, backward=True)


def test_xar_h_takes_1_245_tflop_an_image():
    assert training_flops(ModelConfig(**model_values("xar_h"))) == 1_245_110_599_680
