"""The published reference's numbers, to the tolerance the project promises."""

import argparse
import json
import os

import pytest
import torch

from tests.conftest import GOLDEN, TINY, digits_config, draw, golden, kl16_shapes
from tests.unit.conftest import with_backend
from tests.unit.foreign_checkpoints import assert_bitwise, named_ours, published
from tests.unit.tiny_run import Run
from xar_scale.checkpoint.interop import load_official, official_names
from xar_scale.checkpoint.load import load_weights
from xar_scale.checkpoint.manifest import newest_valid
from xar_scale.config import ModelConfig
from xar_scale.errors import DataError, UsageError
from xar_scale.flow import velocity_loss
from xar_scale.model.xar import XAR, create_model
from xar_scale.presets import model_values
from xar_scale.sampler import sample
from xar_scale.tokenizers import kl16 as autoencoder


@pytest.fixture(params=["dense", "masked", "prefix", "flex"])
def backend(request):
    return request.param


@pytest.fixture
def model(tiny_golden_model, backend):
    yield with_backend(tiny_golden_model, backend)
    with_backend(tiny_golden_model, "auto").zero_grad()


def test_velocity_loss_and_gradient_norms(model, golden_json, backend):
    case = golden("tiny_forward")
    noise = case["noise"].flatten(1, 2)
    velocities = []

    def network(*inputs):
        velocities.append(model(*inputs))
        return velocities[-1]

    trains = backend != "flex"  # which has no backward pass on a CPU
    with torch.set_grad_enabled(trains):
        loss = velocity_loss(network, model.layout, case["latents"], noise, case["time"], case["labels"].long())
    torch.testing.assert_close(velocities[0], case["velocity"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, case["loss"].reshape(()), atol=1e-5, rtol=0, check_dtype=False)
    if not trains:
        return
    loss.backward()
    parameters = dict(model.named_parameters())
    names = official_names(TINY)
    assert set(names) == set(golden_json["tiny"]["grad_norms"])
    for name, norm in golden_json["tiny"]["grad_norms"].items():
        assert parameters[names[name]].grad.norm().item() == pytest.approx(norm, rel=1e-4), name


@pytest.mark.parametrize(("sampler", "steps", "cfg"), [("euler", 4, 2.5), ("euler", 3, 1.0), ("euler_maruyama", 5, 2.2)])
def test_sampled_latents(model, golden_json, sampler, steps, cfg):
    name = f"{sampler}_{steps}_{cfg}"
    case = golden(f"tiny_{name}")
    count = 0

    def reference_draw(shape, dtype):
        nonlocal count
        count += 1
        return torch.from_numpy(draw(f"public/tiny/{sampler}{steps}_{cfg}/draw{count - 1}", shape)).to(dtype)

    latents = sample(model, case["labels"].long(), steps=steps, guidance=cfg, sampler=sampler, draw=reference_draw)
    assert count == golden_json["tiny"][name]["draws"]
    torch.testing.assert_close(latents, case["tokens"], atol=1e-4, rtol=1e-4)


PUBLISHED = {"xar_b": ("xar_base", 172_638_224), "xar_l": ("xar_large", 608_397_968), "xar_h": ("xar_huge", 1_186_024_096)}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_names_shapes_and_counts(preset):
    theirs, count = PUBLISHED[preset]
    published = json.loads((GOLDEN / "official_state_dicts.json").read_text())[theirs]
    config = ModelConfig(**model_values(preset))
    with torch.device("meta"):
        model = XAR(config)
        state = {name: torch.empty(shape) for name, shape in published.items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    ours = named_ours(state)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert published["encoder_blocks.0.attn.rope.freqs"] == [config.head_width // 4]  # the heads, which the weights do not show
    # what the map leaves out is derived from the sizes, nothing else
    left_out = set(published) - set(official_names(config))
    assert all(name == "mask" or ".rope.freqs" in name for name in left_out)


@pytest.fixture(scope="module")
def nano() -> dict[str, dict[str, torch.Tensor]]:
    """Two sets of weights under published names, with what the published code saves along with them."""
    models = {key: create_model("nano", seed=seed) for seed, key in enumerate(("model", "model_ema"))}
    states = {key: published(dict(model.state_dict()), model.config) for key, model in models.items()}
    return states | {"epoch": 3, "args": argparse.Namespace(lr=1e-4)}


@pytest.mark.parametrize("legacy", [False, True])
def test_published_weights_load_as_a_model_from_the_ema_if_present(tmp_path, nano, legacy):
    torch.save(nano, path := tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=not legacy)
    torch.save(nano["model"], alone := tmp_path / "weights.pth")
    cases = [
        (str(path), True, "model_ema"),
        (path, False, "model"),
        (nano, True, "model_ema"),
        (nano, False, "model"),
        (nano["model"], True, "model"),
        (alone, True, "model"),
        ({**nano, "model_ema": None}, True, "model"),
    ]
    for source, ema, chosen in cases:
        model = load_official(source, ema=ema)
        assert model.config == create_model("nano").config and model.training
        assert_bitwise(dict(model.state_dict()), named_ours(nano[chosen]))
        assert all(isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad for parameter in model.parameters())


def test_our_own_runs_name_their_network(tmp_path):
    config = digits_config("train.engine=single", "model.entity=subsample", "model.heads=8")
    run = Run(tmp_path, config=config)
    run.train()
    run.save()
    model = load_official(tmp_path)
    assert model.config == config.model
    assert_bitwise(dict(model.state_dict()), load_weights(newest_valid(tmp_path), "ema"))
    run.store.save(run.manifest(kinds=("ema",)))
    run.store.finish()
    with pytest.raises(UsageError, match="holds ema, but no model"):
        load_official(tmp_path / "ema" / "step-00000001", ema=False)


def test_published_weights_that_do_not_fit_are_refused_by_name(tmp_path, nano):
    state = nano["model"]
    with pytest.raises(DataError, match="lack 1 entries, first pred.bias"):
        load_official({name: tensor for name, tensor in state.items() if name != "pred.bias"})
    with pytest.raises(DataError, match="1 unknown entries, first extra"):
        load_official(state | {"extra": torch.zeros(1)})
    with pytest.raises(DataError, match=r"the state dict: out_proj.bias is \(3,\), the model's is \(16,\)"):
        load_official(state | {"pred.bias": torch.zeros(3)})
    with pytest.raises(DataError, match="matches no preset: its width is 8, it has 2 encoder blocks"):
        load_official(state | {"class_emb.weight": torch.zeros(1001, 8)})
    with pytest.raises(DataError, match="the state dict matches no preset: its width is None"):
        load_official({"weight": torch.zeros(3)})
    unknown = named_ours(state) | {"extra": torch.zeros(1)}
    with pytest.raises(DataError, match=r"the state dict: extra is \(1,\), the model's is missing"):
        load_official(unknown)
    with pytest.raises(DataError, match="the state dict matches no preset: its width is None"):
        load_official({"class_embed.weight": torch.zeros(())})
    for nothing in ({}, {"model": 3}):
        with pytest.raises(DataError, match="the state dict holds no weights"):
            load_official(nothing)
    torch.save({"model": state}, path := tmp_path / "torn.pth")
    os.truncate(path, 5000)
    with pytest.raises(DataError, match=r"torn.pth is torn"):
        load_official(path)
    with pytest.raises(UsageError, match="no checkpoint at"):
        load_official(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("sampler", ["euler", "euler_maruyama"])
def test_batch_1_and_few_steps(sampler, steps):
    model = create_model("nano", grid=(4, 4), entity_size=2, channels=4, classes=10)
    alone = sample(model, [3], steps=steps, guidance=2.0, sampler=sampler, seed=5, first_image=1)
    beside = sample(model, [7, 3], steps=steps, guidance=2.0, sampler=sampler, seed=5)
    assert alone.shape == (1, 4, 4, 4) and torch.isfinite(alone).all()
    torch.testing.assert_close(alone[0], beside[1], atol=1e-5, rtol=1e-5)  # an image does not depend on its batch


def test_the_autoencoder(kl16):
    case = golden("kl16")
    image = torch.from_numpy(draw("public/kl16/image", (1, 3, 64, 64))).tanh().float()
    latent = torch.from_numpy(draw("public/kl16/latent", (1, 16, 4, 4))).float()
    torch.testing.assert_close(kl16.moments(image), case["moments"], atol=1e-4, rtol=0)
    torch.testing.assert_close(kl16.reconstruct(latent), case["decoded"], atol=1e-4, rtol=0)


def test_the_map_of_the_autoencoders_names_is_total(kl16):
    names = autoencoder.official_names()
    assert set(names) == set(kl16_shapes())
    assert sorted(names.values()) == sorted(kl16.network.state_dict())
