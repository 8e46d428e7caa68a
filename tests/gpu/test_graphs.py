"""CUDA graphs: replays compute what eager runs would."""

import copy

import pytest
import torch

from tests.conftest import digits_config, random_batch
from tests.unit.conftest import nano_model
from xar_scale import dist
from xar_scale.diagnosis import Activations
from xar_scale.engines import create_engine
from xar_scale.engines.replicated import ADDED, FIRST, ReplicatedEngine
from xar_scale.evaluate.generate import prepare
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import initial_weights, meta_model
from xar_scale.precision import FP32, MODES
from xar_scale.sampler import sample

COMPILED = ["kernels.compile=true", "model.dropout=0.1"]
ENGINES = ["single", "ddp"]
STEPS = 5


def random_batches(step, passes, device):
    return [random_batch(passes * step + number).to(device) for number in range(passes)]


class Course:
    """Steps of one engine: the losses and the final weights."""

    def __init__(self, engine, device, passes, *more):
        torch._dynamo.reset()
        batch = [f"train.engine={engine}", f"train.global_batch={8 * passes}", "train.micro_batch=8"]
        config = digits_config(*COMPILED, *batch, *more)
        model = meta_model(config.model)
        model.use_kernels(config.kernels, device, MODES[config.train.precision].compute, training=True)
        apply_recompute(model.blocks, config.train.recompute, compiled=True)
        self.engine = create_engine(model, initial_weights(model, 0), config, device)
        self.losses = []
        self.passes, self.device = passes, device

    def step(self, number):
        verdict = self.attempt(number)
        self.engine.step(1e-3, verdict)
        self.losses.append(verdict.loss)

    def attempt(self, number):
        return self.engine.attempt(number, random_batches(number, self.passes, self.device))

    def captured(self, kind):
        batch = random_batch(0).to(self.device)
        return self.engine._graphs.has_captured(kind, batch.latents, batch.labels, batch.t, batch.noise)

    def weights(self):
        return torch.cat([shard.master for shard in self.engine.shards()])


@pytest.mark.parametrize("recompute", ["none", "full", "selective", "offload"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_compiled_step_draws_the_same_dropout_when_it_is_attempted_again(engine, recompute, device):
    course = Course(engine, device, 1, "train.precision=bf16", f"train.recompute={recompute}")
    course.step(0)
    losses, norms = [], []
    for _ in range(4):
        verdict = course.attempt(1)
        losses.append(verdict.loss)
        norms.append(verdict.grad_norm)
        course.engine.discard()
        course.attempt(2)  # draws in between
        course.engine.discard()
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6) and norms == pytest.approx([norms[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("engine", ENGINES)
def test_replayed_micro_batches_train_like_eager_ones(engine, passes, precision, device, monkeypatch):
    courses = []
    for graphs in (False, True):
        with monkeypatch.context() as patch:
            if not graphs:
                patch.setattr(ReplicatedEngine, "replays_graphs", False)
            course = Course(engine, device, passes, f"train.precision={precision}")
            for number in range(2 * STEPS):
                course.step(number)
                assert not graphs or course.captured(FIRST) == (number >= 2)
                assert not graphs or course.captured(ADDED) == (number >= 2 and passes > 1)  # at the first opportunity
            courses.append(course)
    eager, replayed = courses
    assert replayed.losses == pytest.approx(eager.losses, rel=1e-5)
    torch.testing.assert_close(replayed.weights(), eager.weights(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_precision_changes_discarded_attempts_and_hooks_between_replays(engine, device, monkeypatch):
    courses = []
    for graphs in (False, True):
        with monkeypatch.context() as patch:
            if not graphs:
                patch.setattr(ReplicatedEngine, "replays_graphs", False)
            course = Course(engine, device, 2, "train.precision=bf16")
            for number in range(3):
                course.step(number)
            course.attempt(3)
            course.engine.discard()
            course.step(3)
            course.engine.set_precision("tf32")
            for number in range(4, 8):
                course.step(number)
            with Activations(course.engine.model) as seen:
                course.step(8)
            assert len(seen.largest) == len(course.engine.model.blocks)
            course.engine.set_precision("bf16", splits=2)
            for number in range(9, 13):
                course.step(number)
            courses.append(course)
    eager, replayed = courses
    assert replayed.losses == pytest.approx(eager.losses, rel=1e-5)
    torch.testing.assert_close(replayed.weights(), eager.weights(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_between_steps_has_the_memory_of_the_graphs(engine, device):
    course = Course(engine, device, 1, "train.precision=bf16")
    averages = [torch.zeros_like(shard.master) for shard in course.engine.shards()]
    for number in range(4):
        course.step(number)
    weights = course.weights()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    with course.engine.ema_weights(averages, 4):
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < held and not course.captured(FIRST)
    assert torch.equal(course.weights(), weights)
    for number in range(4, 8):
        course.step(number)
    assert course.captured(FIRST)


def test_nccl_accepts_the_vectors_that_graphs_write(device):
    """In place, in a group of one rank, which changes nothing. Tests with gloo cover several ranks."""
    course = Course("ddp", device, 1, "train.precision=bf16")
    for number in range(3):
        course.step(number)
    gradients, weights = course.engine._gradients, course.engine._weights
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        course.attempt(3)
        expected = gradients.clone(), weights.clone()
        dist.reduce_scatter(gradients[course.engine.owned], gradients)
        dist.all_gather(weights, weights[course.engine.owned])
        assert torch.equal(gradients, expected[0]) and torch.equal(weights, expected[1]) and course.captured(FIRST)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("compute", "tolerance"), [(FP32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("entity", ["cell", "scale", "image"])
def test_replayed_networks_sample_like_eager_ones(entity, compute, tolerance, compiled, device):
    torch._dynamo.reset()
    eager = nano_model(entity=entity, grid=(8, 8)).to(device)
    fast = copy.deepcopy(eager)
    prepare(fast, device, compute, compiled=compiled)
    for seed, labels in enumerate(([1, 2, 3], [4, 5, 6], [7, 8], [1, 2, 3], [4, 5, 6, 7, 8])):
        guided = {"guidance": 2.0, "guidance_interval": (0.2, 0.8), "seed": seed}
        with torch.autocast("cuda", dtype=compute, enabled=compute is not FP32):
            expected, found = (sample(model, labels, steps=6, **guided) for model in (eager, fast))
        assert (found - expected).norm() <= tolerance * expected.norm()
    assert fast.forward.__self__._graphs._captured
