"""Blocks and networks compile whole, without graph breaks. Graphs run as traced, without code generation."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing

from tests.unit.conftest import loss_of, nano_model, with_backend
from xar_scale.diagnosis import Activations, Watch
from xar_scale.model.entities import kinds
from xar_scale.model.recompute import apply_recompute
from xar_scale.sampler import sample
from xar_scale.stragglers import ForwardTime

KINDS = [kind for kind in kinds() if kind != "image"]  # one entity has nothing to break


@pytest.fixture
def counted():
    """A compiler that counts the graphs it is given."""
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "backend"), [("cell", "dense"), ("cell", "masked"), *((kind, "prefix") for kind in KINDS)])
def test_all_blocks_are_one_graph_in_training(kind, backend, counted):
    model = with_backend(nano_model(entity=kind), backend).train()
    expected = loss_of(model)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for block in model.blocks:
        block.compile(backend=counted, fullgraph=True)
    loss = loss_of(model)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-5)
    assert counted.frame_count == 1


def test_blocks_with_dropout_are_one_graph(counted):
    model = nano_model(dropout=0.1).train()
    for block in model.blocks:
        block.compile(backend=counted, fullgraph=True)
    loss_of(model).backward()
    assert counted.frame_count == 1


@pytest.mark.parametrize("mode", ["none", "full", "selective", "offload"])
def test_blocks_are_one_graph_with_recomputation_too(mode, counted, monkeypatch):
    """Hooks of observers and engines between blocks stay outside the graph."""
    model = nano_model().train()
    expected = loss_of(model)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    apply_recompute(model.blocks, mode, compiled=True)
    with Activations(model) as seen, ForwardTime(model, torch.device("cpu"), compiled=True) as time:
        loss = loss_of(model)
    loss.backward()
    assert counted.frame_count == 1 and len(seen.largest) == len(model.blocks)
    assert len(time._spans) == len(time.modules) and {*model.blocks} < {*time.modules}
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-5)


def test_a_failure_inside_a_compiled_block_is_still_located(counted, monkeypatch):
    model = nano_model().train()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    apply_recompute(model.blocks, "none", compiled=True)
    loss_of(model)
    with torch.no_grad():
        model.encoder[1].mlp.gate.weight.fill_(torch.nan)
    with Watch(model) as watch:
        loss_of(model)
    assert watch.forward == "encoder.1.mlp.gate"
    before = counted.op_count
    loss_of(model)
    assert counted.op_count == before and counted.frame_count == 1  # the graph is used again


@torch.no_grad()
def test_flex_attention_is_part_of_the_graph(counted):
    model = with_backend(nano_model(entity="scale"), "flex")
    expected = loss_of(model)
    for block in model.blocks:
        block.compile(backend=counted, fullgraph=True)
    torch.testing.assert_close(loss_of(model), expected, atol=0, rtol=1e-6)
    assert counted.frame_count == 1


@pytest.mark.parametrize("kind", ["cell", pytest.param("scale", marks=pytest.mark.long)])
def test_a_compiled_network_samples_the_same_with_one_graph_per_kind_of_call(kind, counted):
    settings = {"steps": 4, "guidance": 2.0, "sampler": "heun", "seed": 3}
    depth = {"depth_encoder": 1, "depth_decoder": 1}
    expected = sample(nano_model(entity=kind, **depth), [1, 2], **settings)
    model = nano_model(entity=kind, **depth)  # which has not run before
    model.compile(backend=counted, fullgraph=True, dynamic=False)
    torch.testing.assert_close(sample(model, [1, 2], **settings), expected, atol=1e-5, rtol=1e-5)
    graphs = counted.frame_count
    assert graphs == 2 * model.layout.entities - 1  # each entity alone, and each but the first together with the one before
    sample(model, [3, 4], **settings)
    assert counted.frame_count == graphs
