"""Hooks that find where a forward-backward pass breaks: the first non-finite module output, each block's largest activation."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from xar_scale.model.layers import Block
from xar_scale.model.xar import XAR


class _Hooked:
    """A context manager with hooks on modules."""

    _hooks: list[RemovableHandle]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()


class Watch(_Hooked):
    """Checks the outputs of a network's modules, and the gradients of these outputs, while the context is open.

    It waits for the device at each module, so it is for retries of a failed step only.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.forward: str | None = None  # the first module in time whose output is not finite; inner modules before outer ones
        self.backward: str | None = None  # the first module whose output's gradient is not finite

    def __enter__(self) -> Self:
        torch.compiler.set_stance("force_eager")  # compiled graphs ignore hooks on modules inside
        self._hooks = [
            module.register_forward_hook(self._check(name or "the network")) for name, module in self.network.named_modules()
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        torch.compiler.set_stance("default")
        super().__exit__(kind, error, trace)

    def _check(self, name: str) -> Callable[..., None]:
        def at_output(module: nn.Module, arguments: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if self.forward is None and not torch.isfinite(output.detach()).all():
                self.forward = name
            if output.requires_grad:
                output.register_hook(at_gradient)

        def at_gradient(gradient: Tensor) -> None:
            if self.backward is None and not torch.isfinite(gradient).all():
                self.backward = name

        return at_output


class Activations(_Hooked):
    """Records the largest absolute output of each block of a network in the context, without waiting for the device."""

    def __init__(self, network: XAR) -> None:
        self.blocks = {name: module for name, module in network.named_modules() if isinstance(module, Block)}
        self._largest: dict[str, Tensor] = {}

    @property
    def largest(self) -> dict[str, float]:
        """The largest absolute output by block name. Waits for the device."""
        values = torch.stack([*self._largest.values()]).tolist() if self._largest else []
        return dict(zip(self._largest, values, strict=True))

    def __enter__(self) -> Self:
        self._hooks = [block.register_forward_hook(self._note(name)) for name, block in self.blocks.items()]
        return self

    def _note(self, name: str) -> Callable[..., None]:
        def at_output(module: nn.Module, arguments: Any, output: Tensor) -> None:
            here = output.detach().abs().amax().float()
            self._largest[name] = torch.maximum(self._largest.get(name, here), here)

        return at_output
