"""Flow matching on the linear path (xAR section 3.3): x_t = (1 - t) x + t noise, velocity noise - x."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xar_scale.model.entities import EntityLayout

# (x_t (B, T, C), t (B, K), labels (B,)) -> velocity (B, T, C): a network, wrapped by an engine or not
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def sample_time(normal_BK: Tensor) -> Tensor:
    """Return times in (0, 1), logit-normal as in the published training: the sigmoid of a standard normal draw."""
    return torch.sigmoid(normal_BK)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the point at time t between data (t = 0) and noise (t = 1)."""
    return (1 - t) * x + t * noise


def velocity_loss(
    network: Velocity, layout: EntityLayout, latents_BCHW: Tensor, noise_BTC: Tensor, t_BK: Tensor, labels_B: Tensor
) -> Tensor:
    """Return the mean squared error of the velocity over samples, tokens and channels. Each entity has its own time and
    noise."""
    x = layout.to_entities(latents_BCHW)
    t_BT1 = layout.expand(t_BK)[..., None]
    velocity, target = network(interpolate(x, noise_BTC, t_BT1), t_BK, labels_B), noise_BTC - x
    exact = torch.promote_types(target.dtype, torch.float32)
    return F.mse_loss(velocity.to(exact), target.to(exact))
