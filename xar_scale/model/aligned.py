"""Linear layers that pad channel counts which GPUs multiply slowly: the MLP of xAR-L has 2730 hidden channels, xAR-H's 3413."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_scale.model.cpu import on_gpu

CHANNELS = 8  # 16 bytes in 16 bits: tensor cores need rows that are a multiple of it


class _Aligned(nn.Linear):
    gathered = False  # whether an engine gathers the weight for each pass and frees it in between


def mark_weights_gathered(model: nn.Module) -> None:
    """Tell the layers that an engine gathers their weights for each pass.

    Compiled graphs then keep no padded weights from the forward to the backward pass: over all blocks these copies would be
    most of the network.
    """
    for layer in model.modules():
        if isinstance(layer, _Aligned):
            layer.gathered = True


class WideningLinear(_Aligned):
    """nn.Linear whose output, on a GPU, is padded with zero channels to a multiple of 8.

    On an H100 the product of 8192 tokens by 1280 x 3413 weights takes 0.79 ms in bf16, by 1280 x 3416 0.11 ms
    (docs/benchmarks). Weights, checkpoints and gradients are those of nn.Linear.
    """

    def forward(self, x: Tensor) -> Tensor:
        more = -self.out_features % CHANNELS if on_gpu(x) else 0
        return _padded_linear(self, x, more) if more else super().forward(x)


class NarrowingLinear(_Aligned):
    """nn.Linear that accepts the padded zero channels: operations between the two layers must map zeros to zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return _padded_linear(self, x, 0) if x.shape[-1] > self.in_features else super().forward(x)


def _padded_linear(layer: _Aligned, x: Tensor, more: int) -> Tensor:
    weight: Tensor = layer.weight
    bias: Tensor = layer.bias
    if torch.is_autocast_enabled(x.device.type):
        compute = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(compute), bias.to(compute)
        if not layer.gathered:
            weight = weight.to(compute)
    return _PaddedProduct.apply(x, weight, bias, more, layer.gathered)


class _PaddedProduct(torch.autograd.Function):
    """Saves the unpadded weight, uncast where an engine gathers it, and pads it again in the backward pass: engines gather that
    weight again, but no copy of it."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, more: int, gathered: bool) -> Tensor:
        context.save_for_backward(x, weight)
        context.more, context.gathered = more, gathered
        padded = _pad(weight.to(x.dtype), x.shape[-1], more)
        return torch.addmm(F.pad(bias, (0, more)), x.flatten(0, -2), padded.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight = context.saved_tensors
        rows, columns = weight.shape
        padding = weight.to(x.dtype), x.shape[-1], context.more
        gradient_of_x = gradient @ (_pad_in_backward(*padding, gradient) if context.gathered else _pad(*padding))
        gradient = gradient.flatten(0, -2)
        gradient_of_weight = (gradient.t() @ x.flatten(0, -2))[:rows, :columns]
        return gradient_of_x, gradient_of_weight.to(weight.dtype), gradient.sum(0)[:rows], None, None


def _pad(weight: Tensor, columns: int, more: int) -> Tensor:
    return F.pad(weight, (0, columns - weight.shape[1], 0, more))


@torch.library.custom_op("xar_scale::pad_in_backward", mutates_args=())
def _pad_in_backward(weight: Tensor, columns: int, more: int, gradient: Tensor) -> Tensor:
    """As ``_pad``, but depends on ``gradient``: what depends on weights alone, a graph computes in its forward pass and
    keeps."""
    return _pad(weight, columns, more)


@_pad_in_backward.register_fake
def _(weight: Tensor, columns: int, more: int, gradient: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0] + more, columns)
