"""Sampling, entity by entity: integrate each from noise, conditioned on the finished ones through the cache."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from xar_scale import rng
from xar_scale.errors import UsageError
from xar_scale.model.kv_cache import KVCache
from xar_scale.model.xar import XAR

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]

# Below this time the score, velocity / t, is too stiff for a stochastic step: the last one is deterministic.
LAST_STOCHASTIC_TIME = 0.04


@torch.no_grad()
def sample(
    model: XAR,
    labels: Tensor | Sequence[int],
    *,
    steps: int = 50,
    guidance: float = 2.2,
    sampler: str = "euler_maruyama",
    seed: int = 0,
    first_image: int = 0,
    draw: Draw | None = None,
) -> Tensor:
    """Latents (B, C, rows, columns) of one image a label.

    Image i of the batch draws from a generator keyed by (seed, first_image + i), so it does not depend on its batch; when
    ``draw(shape, dtype)`` is given, every random tensor comes from there instead: for each entity its start noise in
    float32, then one float64 tensor a stochastic step. Guidance grows linearly over the entities from 1 to ``guidance``;
    with one entity it is ``guidance``. Integration runs in float64, the network in its own dtype.
    """
    if sampler not in _TIMES:
        raise UsageError(f"no sampler {sampler!r}; there are: {', '.join(_TIMES)}")
    if steps < 1:
        raise UsageError(f"sampling needs at least 1 step, not {steps}")
    device, layout = model.in_proj.weight.device, model.layout
    labels_B = torch.as_tensor(labels, dtype=torch.int64, device=device)
    batch = labels_B.shape[0]
    if batch == 0 or labels_B.min() < 0 or labels_B.max() > model.null_class:
        raise UsageError(f"labels must be one or more numbers in 0..{model.null_class}, the last for no class")
    draw = draw or _draw_per_image(seed, range(first_image, first_image + batch))
    guided = guidance > 1
    cache = model.new_cache(2 * batch if guided else batch)
    was_training = model.training
    model.eval()
    try:
        finished: list[Tensor] = []
        for entity, length in enumerate(layout.lengths):
            share = entity / (layout.entities - 1) if layout.entities > 1 else 1.0
            scale = 1 + (guidance - 1) * share
            x = draw((batch, length, model.config.channels), torch.float32).to(device)
            velocity = _EntityVelocity(model, labels_B, entity, finished[-1] if finished else None, scale, cache)
            finished.append(_integrate(velocity, x.double(), _TIMES[sampler](steps), sampler, draw).float())
    finally:
        model.train(was_training)
    return layout.from_entities(torch.cat(finished, dim=1))


class _EntityVelocity:
    """The guided velocity of one entity.

    Its first call feeds the entity before it, finished, at t = 0 beside it, and so leaves that one's keys and values in the
    cache for the calls after. Without guidance the unconditional half is not computed: half of the batch, one cache.
    """

    def __init__(
        self, model: XAR, labels_B: Tensor, entity: int, previous: Tensor | None, scale: float, cache: KVCache
    ) -> None:
        self.model, self.entity, self.previous, self.scale, self.cache = model, entity, previous, scale, cache
        self.length = model.layout.lengths[entity]
        self.guided = scale > 1
        # The first entity's scale is 1, but later guided ones need its unconditional keys: they write those themselves.
        self.labels = torch.cat([labels_B, torch.full_like(labels_B, model.null_class)]) if self.guided else labels_B

    def __call__(self, x_BLC: Tensor, t: float) -> Tensor:
        """(B, L, C) float64 at time t -> velocity, float64."""
        x, first = x_BLC.to(self.model.in_proj.weight.dtype), self.entity
        times = [t]
        if self.previous is not None:
            x, first, times = torch.cat([self.previous.to(x.dtype), x], dim=1), self.entity - 1, [0.0, t]
            self.previous = None
        if self.guided:
            x = torch.cat([x, x])
        t_BK = torch.tensor(times, dtype=torch.float32, device=x.device).expand(x.shape[0], -1)
        velocity = self.model(x, t_BK, self.labels, first=first, cache=self.cache)[:, -self.length :].double()
        if not self.guided:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


def _integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Tensor, sampler: str, draw: Draw) -> Tensor:
    """From t = 1 to 0. On the linear path the probability-flow drift is the velocity itself; a stochastic step follows

    dx = (v - t s) dt + sqrt(2 t) dW with the score s = -((1 - t) v + x) / t (SiT, Ma et al. 2024, section 2.3).
    """
    t_list = times.tolist()
    for step, (t, t_next) in enumerate(pairwise(t_list)):
        dt = t_next - t
        if sampler == "euler":
            x = x + velocity(x, t) * dt
            continue
        stochastic = step < len(t_list) - 2
        noise = draw(tuple(x.shape), torch.float64).to(x.device) if stochastic else None
        v = velocity(x, t)
        drift = v + ((1 - t) * v + x)  # v - t s
        x = x + drift * dt
        if noise is not None:
            x = x + (2 * t * abs(dt)) ** 0.5 * noise
    return x


def _euler_times(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def _euler_maruyama_times(steps: int) -> Tensor:
    """steps - 1 stochastic steps down to LAST_STOCHASTIC_TIME, then one to 0."""
    return torch.cat([torch.linspace(1, LAST_STOCHASTIC_TIME, steps, dtype=torch.float64), torch.zeros(1).double()])


_TIMES = {"euler": _euler_times, "euler_maruyama": _euler_maruyama_times}


def _draw_per_image(seed: int, images: range) -> Draw:
    generators = [rng.torch_generator(seed, "sample", image) for image in images]

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=generator, dtype=dtype) for generator in generators])

    return draw
