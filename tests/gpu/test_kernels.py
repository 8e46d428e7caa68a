"""Compiled graphs, apex's kernels, and a host that does not wait."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.unit.conftest import nano_model, shapes_of
from xar_scale.config import OptimConfig
from xar_scale.flow import velocity_loss
from xar_scale.model import apex
from xar_scale.model.layers import RMSNorm
from xar_scale.optim import create_adamw
from xar_scale.sampler import SAMPLERS, sample

SPEC = find_spec("apex")
has_apex = pytest.mark.skipif(
    SPEC is None or not (Path(next(iter(SPEC.submodule_search_locations or [""]))) / "optimizers").is_dir(),
    reason="needs NVIDIA's apex",
)


def loss_of(model, device):
    layout, generator = model.layout, torch.Generator(device).manual_seed(0)
    latents, t = torch.randn(2, 4, 4, 4, device=device, generator=generator), torch.rand(2, layout.entities, device=device)
    noise = torch.randn(2, layout.tokens, 4, device=device, generator=generator)
    return velocity_loss(model, layout, latents, noise, t * 0 + 0.5, torch.tensor([1, 2], device=device))


@pytest.mark.timeout(300)
def test_compiled_blocks_give_the_same_loss_and_gradients(device):
    model = nano_model().to(device)
    expected = loss_of(model, device)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for block in model.blocks:
        block.compile(fullgraph=True)
    loss = loss_of(model, device)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_within_an_entity_the_host_never_waits(sampler, device, monkeypatch):
    """PyTorch raises at a synchronisation between an entity's first velocity and its end."""
    model, labels = nano_model().to(device), torch.tensor([1, 2])
    entity = SAMPLERS[sampler]

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return entity.integrate(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    sample(model, labels, steps=3, guidance=2.0, sampler=sampler)  # what is made once is made
    monkeypatch.setitem(SAMPLERS, sampler, entity._replace(integrate=watched))
    sample(model, labels, steps=3, guidance=2.0, sampler=sampler)


@has_apex
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_apex_norms_as_torch_does(dtype, affine, device):
    ours, theirs = RMSNorm(96, affine).to(device), RMSNorm(96, affine).to(device)
    theirs.library = "apex"
    x = torch.randn(4, 7, 96, device=device, dtype=dtype, requires_grad=True)
    results = [(out := norm(x), torch.autograd.grad(out.float().square().sum(), x)[0]) for norm in (ours, theirs)]
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


@has_apex
def test_apex_steps_as_torch_does(device):
    assert apex.choose_library("apex", device) == "apex"
    weights = []
    for library in ("torch", "apex"):
        model = nano_model().to(device)
        optimizer = create_adamw(model, shapes_of(model), OptimConfig(lr=1e-3, weight_decay=0.1), library)
        for _ in range(3):
            loss_of(model, device).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
