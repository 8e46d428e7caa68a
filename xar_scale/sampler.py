"""Sampling, entity by entity: integrate each from noise, conditioned on the finished ones through the key/value cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xar_scale import rng
from xar_scale.errors import UsageError
from xar_scale.model.kv_cache import KVCache
from xar_scale.model.xar import XAR

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]
Velocity = Callable[[Tensor, float], Tensor]
Watch = Callable[[int, float, Tensor], None]

# Below this time the score, velocity / t, is too stiff for a stochastic step: the last one is deterministic.
LAST_STOCHASTIC_TIME = 0.04


@torch.no_grad()
def sample(
    model: XAR,
    labels: Tensor | Sequence[int],
    *,
    steps: int = 50,
    guidance: float = 2.2,
    guidance_schedule: str = "linear",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    sampler: str = "euler_maruyama",
    seed: int | Sequence[int] = 0,
    first_image: int = 0,
    draw: Draw | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return latents (B, C, rows, columns), one image per label.

    Image i uses a generator keyed by (seed, first_image + i), so it does not depend on its batch. If ``seed`` is a sequence,
    the key is (seed[i], 0), as for an image sampled alone. ``draw(shape, dtype)``, if given, supplies every random tensor
    instead: for each entity its initial noise in float32, then one float64 tensor per stochastic step.
    ``watch(entity, t, tokens)`` is called with each state at which the velocity is evaluated: the tokens of the finished
    entities and of the current one at time t (B, tokens so far, C).

    ``guidance_schedule``: how the scale grows over the entities, from 1 to ``guidance``: "linear" (published) or "cosine"; or
    "constant". With one entity it is ``guidance``. Guidance is applied at times t within ``guidance_interval`` (Kynkaanniemi et
    al. 2024); a scale of at most 1 costs nothing. Integration runs in float64, the network in its own dtype. Within an entity
    there is no host synchronization. The network may be compiled (docs/sampling.md). Raises UsageError for invalid arguments.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"no sampler {sampler!r}; available: {', '.join(SAMPLERS)}")
    if guidance_schedule not in SCHEDULES:
        raise UsageError(f"no guidance schedule {guidance_schedule!r}; available: {', '.join(SCHEDULES)}")
    if steps < 1:
        raise UsageError(f"sampling needs at least 1 step, not {steps}")
    low, high = guidance_interval
    if not (0 <= guidance < math.inf and 0 <= low <= high <= 1):
        raise UsageError(f"guidance {guidance} within times {low} to {high}: needs guidance >= 0 and 0 <= low <= high <= 1")
    device, layout = model.in_proj.weight.device, model.layout
    labels_B = _labels(labels, model.null_class)
    batch = len(labels_B)
    keys = _keys(seed, first_image, batch)
    labels_B = labels_B.to(device)
    integrate, stochastic_steps, _ = SAMPLERS[sampler]
    draw = draw or _draw_per_image(keys)
    autocast = torch.is_autocast_enabled(device.type)
    compute = torch.get_autocast_dtype(device.type) if autocast else model.in_proj.weight.dtype
    cache = model.new_cache(2 * batch if guidance > 1 else batch, compute)
    layout.on(device)  # otherwise a compiled network needs a second graph, for creating the layout's indices
    was_training = model.training
    model.eval()
    try:
        finished: list[Tensor] = []
        for entity, length in enumerate(layout.lengths):
            share = entity / (layout.entities - 1) if layout.entities > 1 else 1.0
            scale = 1 + (guidance - 1) * SCHEDULES[guidance_schedule](share)
            previous = finished[-1] if finished else None
            velocity: Velocity = _EntityVelocity(model, labels_B, entity, previous, scale, guidance_interval, cache)
            if watch is not None:
                velocity = _watched(velocity, entity, finished, watch)
            shape = (batch, length, model.config.channels)
            x = draw(shape, torch.float32).to(device).double()
            # all before the first step: a copy in each step would make the host wait for the device
            noises = [draw(shape, torch.float64) for _ in range(stochastic_steps(steps))]
            noise = torch.stack(noises).to(device) if noises else x.new_empty(0)
            finished.append(integrate(velocity, x, steps, noise).float())
    finally:
        model.train(was_training)
    return layout.from_entities(torch.cat(finished, dim=1))


def _keys(seed: int | Sequence[int], first_image: int, batch: int) -> list[tuple[int, int]]:
    """Return each image's generator key, (seed, number)."""
    alone = isinstance(seed, Sequence)
    seeds: list[Any] = [*seed] if isinstance(seed, Sequence) else [seed] * batch
    if len(seeds) != batch:
        raise UsageError(f"{len(seeds)} seeds for {batch} labels")
    if wrong := [one for one in seeds if not (isinstance(one, Integral) and 0 <= int(one) < rng.SEEDS)]:
        raise UsageError(f"seed {wrong[0]} is not an integer from 0 to 2^64 - 1")
    return [(int(one), 0 if alone else first_image + image) for image, one in enumerate(seeds)]


def _labels(labels: Tensor | Sequence[int], null_class: int) -> Tensor:
    """Return the labels as int64 (B,), validated."""
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim != 1 or found.is_floating_point() or found.dtype is torch.bool or not len(found):
        raise UsageError(f"labels must be one or more integers in 0..{null_class}, where {null_class} is no class")
    if wrong := [label for label in found.tolist() if not 0 <= label <= null_class]:
        raise UsageError(f"label {wrong[0]} is outside 0..{null_class}, where {null_class} is no class")
    return found.to(torch.int64)


# position of the entity in the sequence, 0 to 1 -> share of the guidance, 0 to 1
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
    "constant": lambda share: 1.0,
}


class _EntityVelocity:
    """The guided velocity of one entity.

    The first call also feeds the previous, finished entity at t = 0, which writes its keys and values to the cache for the
    later calls. Without guidance the unconditional half is not computed: only half of the batch and the first half of the
    cache are used.
    """

    def __init__(
        self,
        model: XAR,
        labels_B: Tensor,
        entity: int,
        previous: Tensor | None,
        scale: float,
        interval: tuple[float, float],
        cache: KVCache,
    ) -> None:
        self.model, self.entity, self.previous, self.cache = model, entity, previous, cache
        self.scale, self.interval = scale, interval
        self.length = model.layout.lengths[entity]
        self.labels, self.null = labels_B, torch.full_like(labels_B, model.null_class)

    def __call__(self, x_BLC: Tensor, t: float) -> Tensor:
        """State (B, L, C) in float64 at time t -> velocity, float64."""
        acts = self.scale > 1 and self.interval[0] <= t <= self.interval[1]
        # Later guided calls need the previous entity in both halves of the cache. It may itself have run without guidance
        # (scale 1): this call feeds it again and writes the unconditional half.
        both = acts or (self.scale > 1 and self.previous is not None)
        x, first, labels = x_BLC.to(self.model.in_proj.weight.dtype), self.entity, self.labels
        if self.previous is not None:
            x, first = torch.cat([self.previous.to(x.dtype), x], dim=1), self.entity - 1
        if both:
            x, labels = torch.cat([x, x]), torch.cat([labels, self.null])
        # filled on the device: copying a list of times would make the host wait
        t_BK = torch.full((x.shape[0], 1 + self.entity - first), t, dtype=torch.float32, device=x.device)
        t_BK[:, :-1] = 0
        self.previous = None
        velocity = self.model(x, t_BK, labels, first=first, cache=self.cache)[:, -self.length :].double()
        if not acts:
            return velocity[: x_BLC.shape[0]]
        conditional, unconditional = velocity.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


def _equal_steps(steps: int) -> Iterator[tuple[float, float]]:
    """Yield (t, t_next) for equal steps from 1 to 0."""
    return pairwise(1 - step / steps for step in range(steps + 1))


def _euler(velocity: Velocity, x: Tensor, steps: int, _noise: Tensor) -> Tensor:
    """Published. On the linear path the drift of the probability flow is the velocity itself."""
    for t, t_next in _equal_steps(steps):
        x = x + velocity(x, t) * (t_next - t)
    return x


def _euler_maruyama(velocity: Velocity, x: Tensor, steps: int, noise_SBLC: Tensor) -> Tensor:
    """Published: steps - 1 stochastic steps down to LAST_STOCHASTIC_TIME, then a deterministic one to 0.

    dx = (v - t s) dt + sqrt(2 t) dW with the score s = -((1 - t) v + x) / t (SiT, Ma et al. 2024, section 2.3).
    """
    share = 1 / max(steps - 1, 1)
    times = [*(1 - (1 - LAST_STOCHASTIC_TIME) * step * share for step in range(steps)), 0.0]
    for step, (t, t_next) in enumerate(pairwise(times)):
        dt = t_next - t
        v = velocity(x, t)
        drift = v + ((1 - t) * v + x)  # v - t s
        x = x + drift * dt
        if step < len(noise_SBLC):
            x = x + (2 * t * abs(dt)) ** 0.5 * noise_SBLC[step]
    return x


def _heun(velocity: Velocity, x: Tensor, steps: int, _noise: Tensor) -> Tensor:
    """Second order, two velocities per step; the last step is an Euler step (EDM, Karras et al. 2022, algorithm 1)."""
    for t, t_next in _equal_steps(steps):
        v = velocity(x, t)
        if t_next > 0:
            v = (v + velocity(x + v * (t_next - t), t_next)) / 2
        x = x + v * (t_next - t)
    return x


def _adams_bashforth(velocity: Velocity, x: Tensor, steps: int, _noise: Tensor) -> Tensor:
    """Two-step Adams-Bashforth: second order with one velocity per step. The first step is an Euler step."""
    before: Tensor | None = None
    for t, t_next in _equal_steps(steps):
        v = velocity(x, t)
        x = x + (v if before is None else 1.5 * v - 0.5 * before) * (t_next - t)
        before = v
    return x


class _Sampler(NamedTuple):
    integrate: Callable[[Velocity, Tensor, int, Tensor], Tensor]  # from t = 1 to 0
    stochastic_steps: Callable[[int], int]
    velocities: Callable[[int], int] = lambda steps: steps  # evaluations per entity


SAMPLERS = {
    "euler": _Sampler(_euler, lambda steps: 0),
    "euler_maruyama": _Sampler(_euler_maruyama, lambda steps: steps - 1),
    "heun": _Sampler(_heun, lambda steps: 0, lambda steps: 2 * steps - 1),
    "adams_bashforth": _Sampler(_adams_bashforth, lambda steps: 0),
}


def _watched(velocity: Velocity, entity: int, finished: Sequence[Tensor], watch: Watch) -> Velocity:
    def shown(x_BLC: Tensor, t: float) -> Tensor:
        watch(entity, t, torch.cat([*finished, x_BLC.float()], dim=1))
        return velocity(x_BLC, t)

    return shown


def _draw_per_image(keys: Sequence[tuple[int, int]]) -> Draw:
    generators = [rng.torch_generator(seed, "sample", image) for seed, image in keys]

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=generator, dtype=dtype) for generator in generators])

    return draw
