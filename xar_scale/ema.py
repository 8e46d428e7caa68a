"""EMA of the weights: each rank averages its own shard, without communication."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xar_scale.config import OptimConfig
from xar_scale.posthoc import exponent, lerp_weight

WIDTHS = (0.05, 0.10)  # sigma_rel of the power-function EMAs, from which post-hoc EMA makes any other (EDM2, section 3.2)


def ema_widths(config: OptimConfig) -> tuple[float, ...]:
    """Return the widths (sigma_rel) of the power-function EMAs that a run keeps."""
    return WIDTHS if config.ema_snapshots_every else ()


def ema_count(config: OptimConfig) -> int:
    """Return how many EMAs of each weight a run keeps."""
    return 1 + len(ema_widths(config))


class EMA:
    """The EMAs of ``weights``, which it only reads: an exponential one, and a power-function one for each width.

    ``averages`` holds them by kind, ``ema`` first. Element i of each belongs to element i of ``weights``.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float, widths: Sequence[float] = ()) -> None:
        self.weights = [weight.detach() for weight in weights]
        self.decay = decay
        self.exponents = {kind_of(width): exponent(width) for width in widths}
        self.averages = {kind: [weight.clone() for weight in self.weights] for kind in ("ema", *self.exponents)}

    @property
    def tensors(self) -> list[Tensor]:
        """The EMA weights of all kinds."""
        return [average for averages in self.averages.values() for average in averages]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Update all kinds: averages <- averages + share * (weights - averages).

        The share is 1 - decay, or for a power-function EMA that of update ``number``, counted from 1.
        """
        for kind, averages in self.averages.items():
            share = lerp_weight(number, self.exponents[kind]) if kind in self.exponents else 1 - self.decay
            torch._foreach_lerp_(averages, self.weights, share)


def kind_of(width: float) -> str:
    """Return the kind of a power-function EMA."""
    return f"ema-{width:.2f}"


POWER_KINDS = {kind_of(width): width for width in WIDTHS}
