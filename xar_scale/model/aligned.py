"""Linear layers between channels whose number GPUs multiply slowly: xAR-L has 2730 of them inside its MLP, xAR-H 3413."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_scale.model.cpu import on_a_gpu

CHANNELS = 8  # 16 bytes in 16 bits: what a row has to be a multiple of for tensor cores to be fed from it


class WideningLinear(nn.Linear):
    """nn.Linear whose output, on a GPU, has zeros for further channels, up to a multiple of 8.

    On an H100 the product of 8192 tokens by 1280 x 3413 weights takes 0.79 ms in bf16, by 1280 x 3416 0.11 ms
    (docs/benchmarks). Its weights, its checkpoints and its gradients are those of nn.Linear.
    """

    def forward(self, x: Tensor) -> Tensor:
        more = -self.out_features % CHANNELS if on_a_gpu(x) else 0
        return _padded_linear(self, x, more) if more else super().forward(x)


class NarrowingLinear(nn.Linear):
    """nn.Linear that takes further channels, which are zero: what lies between the two may make nothing else of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return _padded_linear(self, x, 0) if x.shape[-1] > self.in_features else super().forward(x)


def _padded_linear(layer: nn.Linear, x: Tensor, more: int) -> Tensor:
    weight: Tensor = layer.weight
    bias: Tensor = layer.bias
    if torch.is_autocast_enabled(x.device.type):
        compute = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(compute), weight.to(compute), bias.to(compute)
    return _PaddedProduct.apply(x, weight, bias, more)


class _PaddedProduct(torch.autograd.Function):
    """For the backward pass the weight is kept as it is, and padded anew: engines gather it again, and know of no copies."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, more: int) -> Tensor:
        context.save_for_backward(x, weight)
        context.more = more
        padded = _pad(weight, x.shape[-1], more)
        return torch.addmm(F.pad(bias, (0, more)), x.flatten(0, -2), padded.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = context.saved_tensors
        rows, columns = weight.shape
        gradient_of_x = gradient @ _pad(weight, x.shape[-1], context.more)
        gradient = gradient.flatten(0, -2)
        gradient_of_weight = (gradient.t() @ x.flatten(0, -2))[:rows, :columns]
        return gradient_of_x, gradient_of_weight, gradient.sum(0)[:rows], None


def _pad(weight: Tensor, columns: int, more: int) -> Tensor:
    return F.pad(weight, (0, columns - weight.shape[1], 0, more))
