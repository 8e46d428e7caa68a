"""Block-causal attention and its cache."""

import pytest
import torch
from torch.autograd import gradcheck

from tests.unit.attention_inputs import BACKENDS, LAYOUTS, naive, qkv
from tests.unit.conftest import CPU, nano_model, normal, unequal_layout, with_backend
from xar_scale.model import attention
from xar_scale.model.attention import block_causal_attention
from xar_scale.model.entities import kinds

WITH_BACKWARD = ["dense", "masked", "prefix"]  # on a CPU; tests/gpu has all
# For outputs and gradients of size about 1: a few roundings of the largest
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_matches_the_naive_sum(layout, backend):
    for first in range(layout.entities):
        for last in range(first, layout.entities):
            q, k, v = qkv(layout, first, last)
            out = block_causal_attention(q, k, v, layout, first=first, backend=backend)
            torch.testing.assert_close(out, naive(q, k, v, layout, first), atol=1e-13, rtol=0)


@pytest.mark.parametrize("head_width", [4, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", ["masked", "prefix", "flex"])
def test_every_backend_matches_dense_forward_and_backward(layout, backend, dtype, head_width):
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    for first in range(layout.entities):
        for last in range(first, layout.entities):  # queries of some entities, as with a cache
            results = []
            for name in ("dense", backend):
                inputs = qkv(layout, first, last, dtype, head_width)
                for tensor in inputs:
                    tensor.requires_grad_(backend in WITH_BACKWARD)
                out = block_causal_attention(*inputs, layout, first=first, backend=name)
                assert out.dtype == dtype and out.shape == inputs[0].shape
                gradient = normal(4, *out.shape).to(dtype)
                results.append([out, *(torch.autograd.grad(out, inputs, gradient) if out.requires_grad else ())])
            for dense, other in zip(*results, strict=True):
                torch.testing.assert_close(other, dense, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_is_seen_by_its_entity_and_later_ones_only(layout, backend):
    tensors = qkv(layout)
    before = block_causal_attention(*tensors, layout, backend=backend)
    for entity in range(layout.entities):
        for which in (1, 2):  # key, value
            changed = [tensor.clone() for tensor in tensors]
            changed[which][:, :, layout.offsets[entity]] += 1
            after = block_causal_attention(*changed, layout, backend=backend)
            differs = (after != before).any(-1).all(0).all(0)  # of every sample and head
            begin = layout.offsets[entity]
            assert torch.equal(after[:, :, :begin], before[:, :, :begin])
            if which == 2 or layout.lengths[entity] > 1 or entity > 0:  # else the only key, whatever its score
                assert differs[begin:].all()


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_network_output_depends_on_its_entity_and_earlier_ones_only(backend, kind):
    model = with_backend(nano_model(entity=kind), backend)
    layout = model.layout
    x, t = normal(0, 2, layout.tokens, 4, dtype=torch.float32), normal(1, 2, layout.entities).sigmoid()
    labels = torch.tensor([1, 2])
    before = model(x, t, labels)
    for entity in {0, 1, layout.entities // 2, layout.entities - 1} & {*range(layout.entities)}:
        begin = layout.offsets[entity]
        for input_, time in ((x.clone(), t), (x, t.clone())):  # its tokens, its time
            if time is t:
                input_[:, begin] += 1
            else:
                time[:, entity] = (time[:, entity] + 0.5) % 1
            moved = (model(input_, time, labels) - before).abs().amax(dim=(0, 2))
            assert (moved[:begin] == 0).all()
            assert (moved[begin:] > 1e-6).all()


def test_flex_is_compiled_for_more_masks_than_pytorch_allows_by_itself(monkeypatch):
    """As on a GPU; here with a compiler that generates no code."""
    graphs = []
    compile_ = torch.compile

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_(function, **settings, backend=counting))
    attention._compiled_flex.cache_clear()
    torch._dynamo.reset()
    try:
        kernel, layout = attention._compiled_flex(), nano_model(entity="patch").layout
        for first in range(layout.entities):
            q, k, v = qkv(layout, first, dtype=torch.float32)
            mask = attention._block_mask(layout, first, layout.tokens, CPU)
            expected = block_causal_attention(q, k, v, layout, first=first, backend="dense")
            torch.testing.assert_close(kernel(q, k, v, block_mask=mask), expected, atol=1e-6, rtol=1e-6)
        assert len(graphs) == layout.entities == 16
    finally:
        attention._compiled_flex.cache_clear()
        torch._dynamo.reset()


@pytest.mark.parametrize("backend", WITH_BACKWARD)
def test_dropout_acts_on_the_probabilities_and_keeps_their_mean(backend):
    layout = LAYOUTS["one entity"]
    q, k, v = (tensor[:1, :1].expand(4000, -1, -1, -1) for tensor in qkv(layout))
    plain = block_causal_attention(q, k, v, layout, backend=backend)
    torch.manual_seed(0)
    dropped = block_causal_attention(q, k, v, layout, backend=backend, dropout=0.5)
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped == 0).all(-1).any()  # all four probabilities of a query dropped
    torch.testing.assert_close(dropped.mean(0), plain[0], atol=0.1, rtol=0)


@pytest.mark.parametrize("backend", WITH_BACKWARD)
def test_gradients_match_finite_differences(backend):
    layout = unequal_layout()
    inputs = [tensor[:1, :1, :, :2].clone().requires_grad_() for tensor in qkv(layout, first=1)]
    assert gradcheck(lambda q, k, v: block_causal_attention(q, k, v, layout, first=1, backend=backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entity", kinds())
def test_entity_by_entity_with_a_cache_equals_the_full_forward(entity, backend):
    model = with_backend(nano_model(grid=(2, 4) if entity == "patch" else (4, 8), entity=entity).eval(), backend)
    layout, batch = model.layout, 3
    x, t, labels = (
        normal(0, batch, layout.tokens, 4, dtype=torch.float32),
        normal(1, batch, layout.entities).sigmoid(),
        torch.tensor([1, 10, 3]),
    )
    with torch.no_grad():
        whole = model(x, t, labels)
        for chunk in (1, 2, 3):  # entities fed at a time
            cache, parts = model.new_cache(batch), []
            for first in range(0, layout.entities, chunk):
                last = min(first + chunk, layout.entities)
                tokens = slice(layout.offsets[first], layout.offsets[last])
                parts.append(model(x[:, tokens], t[:, first:last], labels, first=first, cache=cache))
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_encoder_and_decoder_may_differ_in_depth():
    model = nano_model(depth_encoder=1, depth_decoder=2).eval()
    assert (len(model.encoder), len(model.decoder)) == (1, 2)
    assert model.blocks == [model.encoder[0], model.decoder[0], model.decoder[1]]
    x, t, labels = normal(0, 2, 16, 4, dtype=torch.float32), normal(1, 2, 4).sigmoid(), torch.tensor([1, 2])
    cache = model.new_cache(2)
    parts = [model(x[:, 8 * n : 8 * n + 8], t[:, 2 * n : 2 * n + 2], labels, first=2 * n, cache=cache) for n in (0, 1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x, t, labels), atol=1e-5, rtol=0)
