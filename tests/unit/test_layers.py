"""The network's parts: norm, time, modulation, dropout, initialisation."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from tests.conftest import digits_config
from tests.unit.conftest import nano_model, normal, unequal_layout
from xar_scale.config import ModelConfig
from xar_scale.errors import ConfigError, UsageError
from xar_scale.model.entities import create_layout
from xar_scale.model.layers import Block, GatedMLP, RMSNorm, TimeEmbedding, each_entity
from xar_scale.model.rope import rotary_angles
from xar_scale.model.xar import XAR, blank_weights, create_model, initial_weights, meta_model
from xar_scale.presets import model_values
from xar_scale.sampler import sample


def inputs(batch=2):
    return normal(0, batch, 16, 4, dtype=torch.float32), normal(1, batch, 4).sigmoid().float(), torch.arange(batch) + 1


class NoAttention(nn.Module):
    """Replaces attention in a block, so that entities do not affect each other."""

    def forward(self, x, rotary, first, cache):
        return x


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_matches_the_naive_formula(affine):
    norm = RMSNorm(8, affine)
    x = 1e-3 * normal(0, 3, 5, 8, dtype=torch.float32)  # so small that epsilon, 1e-6, is half of it
    weight = torch.ones(8)
    if affine:
        weight = norm.weight.data = normal(1, 8, dtype=torch.float32)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-5)
    assert len(list(norm.parameters())) == int(affine)


def test_rms_norm_of_bfloat16_has_float32_statistics():
    x = (1e-3 * normal(0, 4, 256)).bfloat16()
    expected = RMSNorm(256, affine=False)(x.float())
    out = RMSNorm(256, affine=False)(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected.bfloat16())


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(RMSNorm(8, affine=False)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_the_time_embedding_is_cosines_then_sines_of_the_bin():
    embedding = TimeEmbedding(8, bins=1000)
    embedding.fc1, embedding.fc2 = nn.Linear(256, 256), nn.Identity()
    nn.init.eye_(embedding.fc1.weight)
    nn.init.zeros_(embedding.fc1.bias)
    out = embedding(torch.tensor([[0.25, 0.0]]))
    angles = [250 * 10000 ** (-channel / 128) for channel in range(128)]
    expected = F.silu(torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]))
    torch.testing.assert_close(out[0, 0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(out[0, 1], F.silu(torch.cat([torch.ones(128), torch.zeros(128)])))


def test_time_is_quantised():
    model = nano_model()
    x, t, labels = inputs()

    def at(time):
        return model(x, torch.full_like(t, time), labels)

    assert torch.equal(at(0.5001), at(0.5009))
    assert not torch.equal(at(0.5001), at(0.5011))


def test_the_number_of_time_bins_is_a_setting():
    model = nano_model(time_bins=10)
    x, t, labels = inputs()
    outputs = [model(x, torch.full_like(t, time), labels) for time in (0.501, 0.599, 0.601)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_modulation_is_per_entity():
    model = nano_model()
    x, t, labels = inputs()
    before = model(x, t, labels)
    for entity in range(4):
        changed = t.clone()
        changed[:, entity] = (changed[:, entity] + 0.5) % 1
        moved = (model(x, changed, labels) - before).abs().amax(dim=(0, 2))
        assert (moved[: 4 * entity] == 0).all()
        assert (moved[4 * entity :] > 1e-4).all()


def test_a_block_modulates_each_entity_by_its_own_condition():
    """One block without attention between entities: the condition of one changes its own tokens only."""
    block = nano_model().encoder[0]
    block.attn = NoAttention()
    x, condition = normal(0, 2, 16, 128, dtype=torch.float32), normal(1, 2, 4, 128, dtype=torch.float32)
    before = block(x, condition, None, 0, None)
    changed = condition.clone()
    changed[:, 2] += 1
    moved = (block(x, changed, None, 0, None) != before).any(-1).all(0)
    assert moved.tolist() == [8 <= token < 12 for token in range(16)]


def test_a_block_matches_the_naive_formula():
    block = nano_model().encoder[0]
    block.attn = NoAttention()
    x, condition = normal(0, 2, 16, 128, dtype=torch.float32), normal(1, 2, 4, 128, dtype=torch.float32)
    per_token = block.ada(F.silu(condition)).repeat_interleave(4, dim=1)
    gate1, gate2, scale1, scale2, shift1, shift2 = per_token.chunk(6, dim=-1)
    middle = x + gate1 * (block.norm(x) * (1 + scale1) + shift1)
    expected = middle + gate2 * block.mlp(block.norm(middle) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, condition, None, 0, None), expected)


@pytest.mark.parametrize("kind", ["cell", "scale"])
def test_gradients_of_a_block_and_its_modulation_match_finite_differences(kind):
    """Norm, attention, MLP and modulation together, in float64 throughout."""
    config = ModelConfig(width=8, depth_encoder=1, depth_decoder=1, heads=2, grid=(4, 4), entity=kind, entity_size=2)
    layout = create_layout(config)
    block = Block(config, layout).double()
    angles = rotary_angles(layout.coordinates, 4).double()
    x, condition = normal(0, 1, layout.tokens, 8).requires_grad_(), normal(1, 1, layout.entities, 8).requires_grad_()
    assert gradcheck(lambda x, c: block(x, c, (angles.cos(), angles.sin()), 0, None), (x, condition), fast_mode=True)


def test_a_norm_is_as_exact_as_its_input():
    x = normal(0, 3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(8, affine=False)(x), expected, atol=1e-14, rtol=0)


def test_the_mlp_is_gated_and_two_thirds_as_wide():
    mlp = GatedMLP(ModelConfig(width=24, depth_encoder=1, depth_decoder=1, heads=2, mlp_ratio=3.0))
    x = normal(0, 2, 24, dtype=torch.float32)
    assert mlp.gate.weight.shape == mlp.up.weight.shape == (48, 24)
    torch.testing.assert_close(mlp(x), mlp.down(F.gelu(mlp.gate(x)) * mlp.up(x)))


def test_the_class_matters_and_the_null_class_is_one_more():
    model = nano_model()
    x, t, _ = inputs()
    outputs = [model(x, t, torch.full((2,), label)) for label in (0, 9, model.null_class)]
    assert model.null_class == 10 and model.class_embed.num_embeddings == 11
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


def test_samples_do_not_affect_each_other():
    model = nano_model()
    x, t, labels = inputs(3)
    together = model(x, t, labels)
    for n in range(3):
        alone = model(x[n : n + 1], t[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(alone[0], together[n], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layout", "first"), [(unequal_layout(), 0), (unequal_layout(), 1), (nano_model().layout, 2)])
def test_rows_of_an_entity_meet_its_tokens_and_no_others(layout, first):
    entities = layout.entities - first
    tokens = normal(0, 2, layout.tokens - layout.offsets[first], 3)
    scale, shift = normal(1, 2, entities, 3), normal(2, 2, entities, 3)
    changed = each_entity(layout, first, lambda x, a, b: x * a + b, [tokens], [scale, shift])
    for at in range(tokens.shape[1]):
        entity = sum(at + layout.offsets[first] >= end for end in layout.offsets[1:]) - first
        torch.testing.assert_close(changed[:, at], tokens[:, at] * scale[:, entity] + shift[:, entity])


@pytest.mark.parametrize(
    ("x", "t", "labels"),
    [
        ((2, 256, 16), (2, 2), (2,)),
        ((2, 64, 16), (2, 4), (2,)),
        ((2, 256, 8), (2, 4), (2,)),
        ((2, 16, 16, 16), (2, 4), (2,)),
        ((2, 256, 16), (1, 4), (2,)),  # which would be repeated
        ((2, 256, 16), (2, 4), (1,)),
        ((2, 256, 16), (2,), (2,)),
        ((2, 320, 16), (2, 5), (2,)),
    ],
)
def test_mismatched_shapes_are_refused_and_named(x, t, labels):
    model = nano_model(grid=(16, 16), channels=16)
    given = torch.zeros(x), torch.zeros(t), torch.zeros(labels, dtype=torch.int64)
    with pytest.raises(UsageError, match=re.escape(f"x {x}, t {t} of torch.float32, labels {labels}: expected x")):
        model(*given)


def test_integer_times_are_refused():
    model = nano_model(grid=(16, 16), channels=16)
    with pytest.raises(UsageError, match=r"of torch.int64, .* from 0 to 1"):
        model(torch.zeros(1, 256, 16), torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_dropout_acts_in_training_only():
    model = nano_model(dropout=0.3)
    arguments = inputs()
    model.eval()
    assert torch.equal(model(*arguments), model(*arguments))
    assert torch.equal(model(*arguments), nano_model(dropout=0.0)(*arguments))
    model.train()
    torch.manual_seed(0)
    first, second = model(*arguments), model(*arguments)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(*arguments), first)


def test_dropout_acts_on_attention_and_mlp():
    """At each place: attention's probabilities and output, the MLP's product and output."""
    block = nano_model(dropout=0.5).encoder[0]
    x, rotary = normal(0, 2, 16, 128, dtype=torch.float32), (torch.ones(16, 16), torch.zeros(16, 16))
    attention, mlp = block.attn, block.mlp
    assert (attention(x, rotary, 0, None) == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert (mlp(x) == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    attention.drop = nn.Identity()
    assert not torch.equal(attention(x, rotary, 0, None), attention(x, rotary, 0, None))
    inner = []
    mlp.down.register_forward_pre_hook(lambda module, values: inner.append(values[0]))
    mlp(x)
    assert (inner[0] == 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_the_initialisation_is_the_published_one():
    model = nano_model()
    linear = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        if name in linear:
            bound = math.sqrt(6 / (linear[name].in_features + linear[name].out_features))
            assert 0.95 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            assert abs(parameter.mean()) < 0.1 * bound, name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert name in ("class_embed.weight", "encoder_pos", "decoder_pos")
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert parameter.abs().max() > 0.05, name  # normal, not truncated


def test_the_initialisation_does_not_depend_on_the_order_of_construction():
    model, other = nano_model(), nano_model()
    for module in [other, *other.modules()]:
        module._modules = dict(reversed(module._modules.items()))
        module._parameters = dict(reversed(module._parameters.items()))
    assert [name for name, _ in model.named_parameters()] != [name for name, _ in other.named_parameters()]
    for parameter in other.parameters():
        parameter.data.zero_()
    for weight in initial_weights(other, seed=0):
        weight.place(torch.device("cpu"))
    ours, theirs = model.state_dict(), other.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_initialisation_is_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = nano_model(seed=5).state_dict()
    torch.manual_seed(2)
    again, other = nano_model(seed=5).state_dict(), nano_model(seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if first[name].ndim > 1]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_no_two_parameters_start_alike():
    weights = [parameter for parameter in nano_model().parameters() if parameter.ndim > 1]
    starts = {tuple((parameter / parameter.std()).flatten()[:4].tolist()) for parameter in weights}
    assert len(starts) == len(weights)


def test_a_model_is_a_preset_with_changes():
    model = create_model("nano", channels=7, classes=3, dropout=0.25)
    assert isinstance(model, XAR) and model.config.width == 128
    assert (model.config.channels, model.config.classes, model.config.dropout) == (7, 3, 0.25)


@pytest.mark.parametrize(
    ("name", "count"), [("nano", 1_451_704), ("xar_2b", 2_091_486_176), ("xar_4b", 3_637_477_360), ("xar_7b", 7_097_825_216)]
)
def test_a_model_of_any_size_is_created_without_memory_for_it(name, count):
    """The published sizes are counted in test_parity."""
    model = meta_model(ModelConfig(**model_values(name)))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert not list(model.buffers())  # nothing else needs memory


def test_the_demonstration_s_model_is_of_the_documented_size():
    model = meta_model(digits_config().model)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_260_460


@pytest.mark.parametrize("name", ["xar_2b", "xar_4b", "xar_7b"])
def test_models_beyond_the_published_ones_have_heads_of_128_and_halves_alike(name):
    config = ModelConfig(**model_values(name))
    assert config.head_width == 128 and config.depth_encoder == config.depth_decoder


def test_blank_weights_are_zeros_for_every_parameter():
    model = meta_model(nano_model().config)
    for weight in blank_weights(model):
        weight.place(torch.device("cpu"))
    reference = dict(nano_model().named_parameters())
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in reference.items()}
    assert all(parameter.device.type == "cpu" and not parameter.any() for parameter in model.parameters())


def test_unknown_models_and_fields_are_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="no model 'xar_huge'; available: nano, xar_b, xar_l, xar_h"):
        create_model("xar_huge")
    with pytest.raises(ConfigError, match="unknown key size; known keys: width, depth_encoder"):
        create_model("nano", size=3)
    with pytest.raises(ConfigError, match="heads = 0: "):
        create_model("nano", heads=0)
    with pytest.raises(ConfigError, match="grid.0 = 0: "):
        create_model("nano", grid=(0, 4))
    with pytest.raises(ConfigError, match="do not tile a 5x5 grid"):
        create_model("nano", grid=(5, 5), entity_size=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_runs(dtype):
    model = nano_model().to(dtype)
    latents = sample(model, [1], steps=1, guidance=1.0)
    assert torch.isfinite(latents).all()
