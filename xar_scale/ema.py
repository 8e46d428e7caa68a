"""Moving averages of the weights, each rank of its own shard: no communication, no gather."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xar_scale.config import OptimConfig
from xar_scale.posthoc import exponent, share_of_new

WIDTHS = (0.05, 0.10)  # sigma_rel of the averages that any other is made of afterwards (EDM2, section 3.2)


def ema_widths(config: OptimConfig) -> tuple[float, ...]:
    """Of the power-function averages that a run keeps."""
    return WIDTHS if config.ema_snapshots_every else ()


def ema_count(config: OptimConfig) -> int:
    """How many averages of each weight a run keeps."""
    return 1 + len(ema_widths(config))


class EMA:
    """Averages ``weights``, which it only reads: an exponential average, and a power-function average of each width.

    ``averages`` has them by kind, ``ema`` first; element i of each belongs to element i of ``weights``.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, widths: Sequence[float] = ()) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.decay = decay
        self.exponents = {kind_of(width): exponent(width) for width in widths}
        self.averages = {kind: [weight.clone() for weight in self.weights] for kind in ("ema", *self.exponents)}

    @property
    def tensors(self) -> list[Tensor]:
        """Of all kinds."""
        return [average for averages in self.averages.values() for average in averages]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """averages <- averages + share * (weights - averages): 1 - decay, or what update ``number``, from 1, takes over."""
        for kind, averages in self.averages.items():
            share = share_of_new(number, self.exponents[kind]) if kind in self.exponents else 1 - self.decay
            torch._foreach_lerp_(averages, self.weights, share)


def kind_of(width: float) -> str:
    """The kind of a power-function average."""
    return f"ema-{width:.2f}"


POWER_KINDS = {kind_of(width): width for width in WIDTHS}
