"""The published reference's numbers on a GPU. They were recorded on a CPU in float32: each precision has its tolerance."""

import pytest
import torch

from tests.conftest import draw, golden
from tests.unit.conftest import with_backend
from xar_scale.checkpoint.interop import official_names
from xar_scale.flow import velocity_loss
from xar_scale.precision import apply_matmul_mode
from xar_scale.sampler import sample
from xar_scale.tokenizers.kl16 import KL16Tokenizer

# Largest deviation from the recorded velocities, whose size is about 1
VELOCITY = {"highest": 1e-4, "high": 1e-2, "bf16": 1e-1}
GRADIENT = {"highest": 1e-3, "high": 2e-2, "bf16": 1e-1}  # relative, of norms


@pytest.fixture(params=["dense", "masked", "prefix", "flex"])
def model(request, tiny_golden_model, device):
    yield with_backend(tiny_golden_model.to(device), request.param)
    with_backend(tiny_golden_model.to("cpu"), "auto").zero_grad()


def forward_backward(model, golden_json, device, precision):
    case = {name: tensor.to(device) for name, tensor in golden("tiny_forward").items()}
    model.zero_grad()
    velocities = []

    def network(*inputs):
        velocities.append(model(*inputs))
        return velocities[-1]

    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
        noise = case["noise"].flatten(1, 2)
        loss = velocity_loss(network, model.layout, case["latents"], noise, case["time"], case["labels"].long())
    loss.backward()
    assert (velocities[0].float() - case["velocity"]).abs().max() < VELOCITY[precision]
    parameters = dict(model.named_parameters())
    for theirs, ours in official_names(model.config).items():
        expected = golden_json["tiny"]["grad_norms"][theirs]
        assert parameters[ours].grad.norm().item() == pytest.approx(expected, rel=GRADIENT[precision]), theirs


def test_forward_and_backward(model, golden_json, device, matmul):
    forward_backward(model, golden_json, device, matmul)


def test_forward_and_backward_in_bf16(model, golden_json, device):
    forward_backward(model, golden_json, device, "bf16")


@pytest.mark.parametrize("mode", ["fp32", "tf32"])
def test_the_autoencoder(kl16_weights, device, mode):
    apply_matmul_mode(mode)
    kl16, case = KL16Tokenizer(kl16_weights, device), golden("kl16")
    image = torch.from_numpy(draw("public/kl16/image", (1, 3, 64, 64))).tanh().float()
    latent = torch.from_numpy(draw("public/kl16/latent", (1, 16, 4, 4))).float()
    assert (kl16.moments(image).cpu() - case["moments"]).abs().max() < 1e-2
    assert (kl16.reconstruct(latent).cpu() - case["decoded"]).abs().max() < 2e-2


@pytest.mark.parametrize(("sampler", "steps", "cfg"), [("euler", 4, 2.5), ("euler", 3, 1.0), ("euler_maruyama", 5, 2.2)])
def test_sampled_latents(model, sampler, steps, cfg):
    case, count = golden(f"tiny_{sampler}_{steps}_{cfg}"), iter(range(100))

    def reference_draw(shape, dtype):
        return torch.from_numpy(draw(f"public/tiny/{sampler}{steps}_{cfg}/draw{next(count)}", shape)).to(dtype)

    latents = sample(model, case["labels"].long(), steps=steps, guidance=cfg, sampler=sampler, draw=reference_draw)
    torch.testing.assert_close(latents.cpu(), case["tokens"], atol=1e-3, rtol=1e-3)
