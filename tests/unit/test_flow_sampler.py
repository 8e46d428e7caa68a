"""Flow matching and sampling, on networks with known integrals."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck

from tests.unit.conftest import nano_model, normal, unequal_layout
from xar_scale.config import ModelConfig
from xar_scale.errors import UsageError
from xar_scale.flow import interpolate, sample_time, velocity_loss
from xar_scale.model.entities import create_layout, kinds
from xar_scale.sampler import LAST_STOCHASTIC_TIME, SAMPLERS, sample

CLASSES = 5


class KnownField(nn.Module):
    """Stands for an XAR: the velocity of each token is ``field(x, t (B, K, 1), labels (B, 1, 1))``; calls are recorded."""

    def __init__(self, field, grid=(4, 4), side=2):
        super().__init__()
        self.config = ModelConfig(
            width=8, depth_encoder=1, depth_decoder=1, heads=1, channels=3, grid=grid, entity_size=side, classes=CLASSES
        )
        self.layout, self.null_class = create_layout(self.config), CLASSES
        self.in_proj = nn.Linear(1, 1).double()
        self.field, self.calls = field, []

    def new_cache(self, batch, dtype):
        return None

    def forward(self, x, t, labels, first, cache):
        assert not self.training
        self.calls.append((first, tuple(t[0].tolist()), len(x)))
        entity = self.layout.on(x.device).entity[self.layout.offsets[first] :][: x.shape[1]] - first
        return self.field(x, t[:, entity, None], labels[:, None, None].expand_as(x))


def zeros(shape, dtype):
    return torch.zeros(shape, dtype=dtype)


def test_the_path_runs_from_data_to_noise():
    x, noise = normal(0, 2, 3), normal(1, 2, 3)
    assert torch.equal(interpolate(x, noise, torch.zeros(())), x)
    assert torch.equal(interpolate(x, noise, torch.ones(())), noise)
    torch.testing.assert_close(interpolate(x, noise, torch.tensor(0.25)), 0.75 * x + 0.25 * noise)


def test_times_are_the_sigmoid_of_a_normal_draw():
    draw = normal(0, 4, 3)
    torch.testing.assert_close(sample_time(draw), 1 / (1 + torch.exp(-draw)))


def test_the_loss_is_the_naive_mean_over_tokens_each_at_the_time_of_its_entity():
    layout = unequal_layout()
    latents, noise, t = normal(0, 2, 3, 2, 5), normal(1, 2, 10, 3), torch.rand(2, 4, dtype=torch.float64)
    labels, seen = torch.tensor([4, 2]), []

    def network(x, times, of):
        seen.append((x, times, of))
        return 0.3 * x + of[:, None, None]

    loss = velocity_loss(network, layout, latents, noise, t, labels)

    total, point = 0.0, torch.empty(2, 10, 3, dtype=torch.float64)
    for sample_ in range(2):
        token = 0
        for entity, length in enumerate(layout.lengths):
            for _ in range(length):
                row, column = divmod(int(layout.order[token]), 5)
                data, time = latents[sample_, :, row, column], t[sample_, entity]
                point[sample_, token] = data + time * (noise[sample_, token] - data)
                velocity = 0.3 * point[sample_, token] + labels[sample_]
                total += ((velocity - (noise[sample_, token] - data)) ** 2).sum()
                token += 1
    torch.testing.assert_close(seen[0][0], point)
    assert seen[0][1] is t and seen[0][2] is labels
    torch.testing.assert_close(loss, total / (2 * 10 * 3), atol=1e-6, rtol=1e-6)


def test_gradients_of_the_loss_are_those_of_finite_differences():
    layout = unequal_layout()
    inputs = [normal(0, 1, 3, 2, 5), normal(1, 1, 10, 3), normal(2, 1, 4).sigmoid(), normal(3, 3, 3)]

    def loss(latents, noise, t, weight):
        network = lambda x, t_BK, _: torch.tanh(x @ weight) * layout.expand(t_BK)[..., None]  # noqa: E731
        return velocity_loss(network, layout, latents, noise, t, torch.zeros(1))

    assert gradcheck(loss, [tensor.requires_grad_() for tensor in inputs])


def test_the_loss_of_low_precision_tensors_is_computed_in_float32():
    layout = unequal_layout()
    latents, noise = normal(0, 2, 3, 2, 5).bfloat16(), normal(1, 2, 10, 3).bfloat16()
    loss = velocity_loss(lambda x, t, y: x.bfloat16(), layout, latents, noise, torch.rand(2, 4), torch.zeros(2))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_euler_integrates_a_constant_velocity_exactly(steps):
    noise, data = normal(0, 2, 16, 3, dtype=torch.float32), normal(1, 2, 16, 3, dtype=torch.float32)
    entity = iter(noise.split(4, dim=1))
    velocity = iter([v for v in (noise - data).split(4, dim=1) for _ in range(steps)])
    model = KnownField(lambda x, t, y: next(velocity).repeat(1, x.shape[1] // 4, 1))
    out = sample(model, [0, 1], steps=steps, guidance=1, sampler="euler", draw=lambda shape, dtype: next(entity).to(dtype))
    torch.testing.assert_close(model.layout.to_entities(out), data, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_euler_takes_equal_steps_and_passes_position_and_time(steps):
    model = KnownField(lambda x, t, y: 2 * x + t.double())
    x = torch.ones((), dtype=torch.float64)
    for step in range(steps):
        x = x - (2 * x + (1 - step / steps)) / steps
    out = sample(model, [0], steps=steps, guidance=1, sampler="euler", draw=lambda shape, dtype: torch.ones(shape, dtype=dtype))
    torch.testing.assert_close(out, x.float().expand_as(out), atol=1e-6, rtol=0)


def test_the_first_call_of_an_entity_also_feeds_the_previous_one():
    fed = []
    model = KnownField(lambda x, t, y: fed.append(x.clone()) or torch.ones_like(x))
    sample(model, [0, 1], steps=2, guidance=1, sampler="euler", draw=zeros)
    assert model.calls == [
        (0, (1.0,), 2),
        (0, (0.5,), 2),
        (0, (0.0, 1.0), 2),
        (1, (0.5,), 2),
        (1, (0.0, 1.0), 2),
        (2, (0.5,), 2),
        (2, (0.0, 1.0), 2),
        (3, (0.5,), 2),
    ]
    assert (fed[2][:, :4] == -1).all() and (fed[2][:, 4:] == 0).all()  # the finished entity, then the new noise


def _naive_euler_maruyama(x, steps, field, noises):
    times = [1 - (1 - LAST_STOCHASTIC_TIME) * step / max(steps - 1, 1) for step in range(steps)] + [0.0]
    for step in range(steps):
        t, dt = times[step], times[step] - times[step + 1]
        v = field(x, t)
        score = -((1 - t) * v + x) / t
        x = x - (v - t * score) * dt
        if step < steps - 1:
            x = x + (2 * t * dt) ** 0.5 * noises[step]
    return x


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_euler_maruyama_is_the_naive_loop(steps):
    drawn = []

    def draw(shape, dtype):
        drawn.append(normal(len(drawn), *shape, dtype=dtype))
        return drawn[-1]

    model = KnownField(lambda x, t, y: 0.5 * x + t.double())
    out = model.layout.to_entities(sample(model, [0, 1], steps=steps, guidance=1, sampler="euler_maruyama", draw=draw))
    for entity in range(4):
        start, *noises = drawn[entity * steps : (entity + 1) * steps]
        expected = _naive_euler_maruyama(start.double(), steps, lambda x, t: 0.5 * x + t, noises)
        torch.testing.assert_close(out[:, 4 * entity : 4 * entity + 4], expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("sampler", "steps"), [(sampler, steps) for sampler in SAMPLERS for steps in (1, 5)])
def test_an_entity_draws_its_start_and_one_noise_a_stochastic_step(sampler, steps):
    drawn = []

    def draw(shape, dtype):
        drawn.append((shape, dtype))
        return torch.zeros(shape, dtype=dtype)

    sample(KnownField(lambda x, t, y: x), [0, 1], steps=steps, guidance=2, sampler=sampler, draw=draw)
    stochastic = steps - 1 if sampler == "euler_maruyama" else 0
    assert drawn == [((2, 4, 3), torch.float32), *[((2, 4, 3), torch.float64)] * stochastic] * 4


@pytest.mark.parametrize("guidance", [1.5, 4.0])
def test_guidance_grows_linearly_over_the_entities(guidance):
    model = KnownField(lambda x, t, y: (y != CLASSES).double())  # 1 with a class, 0 without: guided, it is the scale
    out = model.layout.to_entities(sample(model, [0, 3], steps=3, guidance=guidance, sampler="euler", draw=zeros))
    for entity in range(4):
        expected = -(1 + (guidance - 1) * entity / 3)
        torch.testing.assert_close(out[:, 4 * entity : 4 * entity + 4], torch.full((2, 4, 3), expected))
    # the first entity's scale is 1: no unconditional half
    assert [batch for _, _, batch in model.calls] == [2] * 3 + [4] * 9


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("cosine", [0, 0.25, 0.75, 1]), ("constant", [1.0, 1.0, 1.0, 1.0]), ("linear", [0, 1 / 3, 2 / 3, 1])],
)
def test_guidance_follows_its_schedule(schedule, shares):
    model = KnownField(lambda x, t, y: (y != CLASSES).double())
    out = sample(model, [0, 3], steps=3, guidance=3.0, guidance_schedule=schedule, sampler="euler", draw=zeros)
    scales = -model.layout.to_entities(out)[:, ::4]
    torch.testing.assert_close(scales, torch.tensor([1 + 2 * share for share in shares])[None, :, None].expand(2, 4, 3))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_one_entity_is_guided_at_full_strength(schedule):
    model = KnownField(lambda x, t, y: (y != CLASSES).double(), grid=(2, 2))
    out = sample(model, [0], steps=2, guidance=3.0, guidance_schedule=schedule, sampler="euler", draw=zeros)
    torch.testing.assert_close(out, torch.full((1, 3, 2, 2), -3.0))


def test_guidance_acts_within_its_interval_of_times_and_costs_nothing_outside():
    model = KnownField(lambda x, t, y: (y != CLASSES).double())
    settings = dict(guidance=3.0, guidance_schedule="constant", guidance_interval=(0.25, 0.5))
    out = sample(model, [0, 3], steps=4, sampler="euler", draw=zeros, **settings)
    torch.testing.assert_close(out, torch.full((2, 3, 4, 4), -(1 + 3 + 3 + 1) / 4))  # at t = 1, 0.75, 0.5, 0.25
    times = [t[-1] for _, t, _ in model.calls]
    assert times == [1, 0.75, 0.5, 0.25] * 4
    batches = [batch for _, _, batch in model.calls]
    # an entity's first call feeds the previous entity, which later guided calls need unconditionally too
    assert batches == [2, 2, 4, 4] + [4, 2, 4, 4] * 3


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.6, 1.0), (0.3, 0.7)])
def test_guidance_equals_separate_conditional_and_unconditional_passes(schedule, interval):
    """Against two separate forward passes: the cache of the unconditional half is right from the second entity on."""
    model = nano_model(classes=CLASSES)
    labels, guidance, steps = torch.tensor([1, 3]), 3.0, 3
    starts = [normal(entity, 2, 4, 4, dtype=torch.float32) for entity in range(4)]
    queue = iter(starts)
    settings = dict(guidance=guidance, guidance_schedule=schedule, guidance_interval=interval, sampler="euler")
    out = sample(model, labels, steps=steps, draw=lambda shape, dtype: next(queue), **settings)

    done = []
    with torch.no_grad():
        for entity, start in enumerate(starts):
            x, full = start.double(), guidance if schedule == "constant" else 1 + (guidance - 1) * entity / 3
            for step in range(steps):
                now = 1 - step / steps
                scale = full if interval[0] <= now <= interval[1] else 1
                t = torch.tensor([[0.0] * entity + [now]]).expand(2, -1)
                with_class, without = (
                    model(torch.cat([*done, x], dim=1).float(), t, y)[:, -4:].double()
                    for y in (labels, torch.full_like(labels, CLASSES))
                )
                x = x - (without + scale * (with_class - without)) / steps
            done.append(x)
    torch.testing.assert_close(model.layout.to_entities(out).double(), torch.cat(done, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_without_guidance_nothing_unconditional_is_computed(guidance):
    caches = []
    model = KnownField(lambda x, t, y: (y != CLASSES).double())
    model.new_cache = lambda batch, dtype: caches.append(batch)
    out = sample(model, [0, 3], steps=2, guidance=guidance, sampler="euler", draw=zeros)
    assert {batch for _, _, batch in model.calls} == {2} and caches == [2]
    torch.testing.assert_close(out, torch.full((2, 3, 4, 4), -1.0))


def errors(sampler: str, steps: int) -> float:
    """Error at the end of one trajectory of dx/dt = x cos(6 t), whose exact solution is known."""
    model = KnownField(lambda x, t, y: x * torch.cos(6 * t.double()), grid=(2, 2))
    start = normal(0, 1, 4, 3, dtype=torch.float32)
    out = model.layout.to_entities(sample(model, [0], steps=steps, guidance=1, sampler=sampler, draw=lambda *_: start))
    return (out - start * math.exp(-math.sin(6) / 6)).norm().item()


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("adams_bashforth", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler, order):
    coarse, fine = errors(sampler, 40), errors(sampler, 160)
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 5), ("euler_maruyama", 5), ("heun", 9), ("adams_bashforth", 5)])
def test_five_steps_cost_so_many_velocities(sampler, calls):
    model = KnownField(lambda x, t, y: x)
    sample(model, [0], steps=5, guidance=1, sampler=sampler)
    assert len(model.calls) == 4 * calls and calls == SAMPLERS[sampler].velocities(5)
    assert min(t for _, times, _ in model.calls for t in times[-1:]) > 0  # none at t = 0


def test_heun_is_the_mean_of_the_slopes_at_both_ends():
    model = KnownField(lambda x, t, y: 2 * x + t.double())
    out = sample(model, [0], steps=2, guidance=1, sampler="heun", draw=lambda shape, dtype: torch.ones(shape, dtype=dtype))
    middle = 1 - 0.5 * (3 + (2 * (1 - 1.5) + 0.5)) / 2
    torch.testing.assert_close(out, torch.full_like(out, middle - 0.5 * (2 * middle + 0.5)), atol=1e-6, rtol=0)


def test_adams_bashforth_extrapolates_the_velocity():
    model = KnownField(lambda x, t, y: 2 * x + t.double())
    settings = dict(steps=2, guidance=1, sampler="adams_bashforth")
    out = sample(model, [0], draw=lambda shape, dtype: torch.ones(shape, dtype=dtype), **settings)
    middle = 1 - 0.5 * 3
    slope = 1.5 * (2 * middle + 0.5) - 0.5 * 3
    torch.testing.assert_close(out, torch.full_like(out, middle - 0.5 * slope), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_inside_an_entity_reads_a_value_on_the_host(sampler):
    """On fake tensors, where reading a value on the host, a synchronization on a GPU, raises."""
    model, labels = nano_model(), torch.tensor([1, 2])
    model.layout.on(labels.device)  # made once, of real numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = sample(model, labels, steps=4, guidance=2.0, sampler=sampler, draw=zeros)
    assert isinstance(out, FakeTensor) and out.shape == (2, 4, 4, 4)


def test_an_image_is_a_function_of_seed_and_number():
    model = KnownField(lambda x, t, y: x)
    settings = {"steps": 2, "guidance": 1, "sampler": "euler_maruyama"}
    images = sample(model, [0] * 4, seed=1, **settings)
    assert torch.equal(images, sample(model, [0] * 4, seed=1, **settings))
    assert torch.equal(images[2:], sample(model, [0] * 2, seed=1, first_image=2, **settings))
    assert not torch.equal(images, sample(model, [0] * 4, seed=2, **settings))
    assert not torch.equal(images[0], images[1])
    assert images.shape == (4, 3, 4, 4) and images.dtype == torch.float32


def test_unknown_samplers_and_step_counts_are_refused():
    model = KnownField(lambda x, t, y: x)
    with pytest.raises(UsageError, match="no sampler 'rk4'; available: euler, euler_maruyama, heun, adams_bashforth"):
        sample(model, [0], sampler="rk4")
    with pytest.raises(UsageError, match="no guidance schedule 'none'; available: linear, cosine, constant"):
        sample(model, [0], guidance_schedule="none")
    with pytest.raises(UsageError, match="at least 1 step, not 0"):
        sample(model, [0], steps=0)


@pytest.mark.parametrize("interval", [(0.9, 0.1), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_invalid_guidance_intervals_are_refused(interval):
    model = KnownField(lambda x, t, y: x)
    with pytest.raises(UsageError, match=f"guidance 2.0 within times {interval[0]} to {interval[1]}"):
        sample(model, [0], guidance=2.0, guidance_interval=interval)


@pytest.mark.parametrize("guidance", [-1.0, math.nan, math.inf])
def test_invalid_guidance_scales_are_refused(guidance):
    with pytest.raises(UsageError, match=f"guidance {guidance} within"):
        sample(KnownField(lambda x, t, y: x), [0], guidance=guidance)


@pytest.mark.parametrize("labels", [[], 3, [[1]], [0.5], [True], None, "7", [-1], [0, CLASSES + 1]])
def test_invalid_labels_are_refused(labels):
    model = KnownField(lambda x, t, y: x)
    with pytest.raises(UsageError, match=rf"(integers in|label \S+ is outside) 0..{CLASSES}, where {CLASSES} is no class"):
        sample(model, labels)
    assert model.calls == []
    assert sample(model, [0, CLASSES], steps=1).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, None, [0, 2**64]])
def test_invalid_seeds_are_refused(seed):
    with pytest.raises(UsageError, match=r"seed \S+ is not an integer from 0 to 2\^64 - 1"):
        sample(KnownField(lambda x, t, y: x), [0, 1], seed=seed)


def test_integration_is_in_float64_whatever_the_network_computes_in():
    """Fifty steps at a velocity of 1/3 in bfloat16 add up to it exactly: the state is not rounded to bfloat16."""
    model = KnownField(lambda x, t, y: torch.full_like(x, 1 / 3)).bfloat16()
    out = sample(model, [0], steps=50, guidance=1, sampler="euler", draw=zeros)
    torch.testing.assert_close(out, torch.full_like(out, -(1 / 3)).bfloat16().float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_comes_back_also_after_an_error(training):
    model = KnownField(lambda x, t, y: x).train(training)
    sample(model, [0], steps=1)
    assert model.training is training

    def breaks(x, t, y):
        raise ArithmeticError

    model = KnownField(breaks).train(training)
    with pytest.raises(ArithmeticError):
        sample(model, [0], steps=1)
    assert model.training is training


@pytest.mark.parametrize("entity", kinds())
def test_every_kind_of_entity_is_sampled(entity):
    model = nano_model(entity=entity)
    alone = sample(model, [3], steps=2, guidance=2.0, seed=5, first_image=1)
    beside = sample(model, [7, 3], steps=2, guidance=2.0, seed=5)
    assert alone.shape == (1, 4, 4, 4) and torch.isfinite(alone).all()
    torch.testing.assert_close(alone[0], beside[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("entity", kinds())
def test_the_loss_of_every_kind_is_that_of_its_tokens(entity):
    model = nano_model(entity=entity)
    layout, latents = model.layout, normal(0, 2, 4, 4, 4, dtype=torch.float32)
    noise = normal(1, 2, layout.tokens, 4, dtype=torch.float32)
    t, labels = normal(2, 2, layout.entities).sigmoid().float(), torch.tensor([1, 2])
    tokens = layout.to_entities(latents)
    x_t, target = torch.empty_like(tokens), noise - tokens
    for k in range(layout.entities):
        part = slice(layout.offsets[k], layout.offsets[k + 1])
        x_t[:, part] = (1 - t[:, k, None, None]) * tokens[:, part] + t[:, k, None, None] * noise[:, part]
    expected = (model(x_t, t, labels) - target).square().mean()
    torch.testing.assert_close(velocity_loss(model, layout, latents, noise, t, labels), expected)
