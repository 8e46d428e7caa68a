"""Compiled graphs, apex's kernels, and no host synchronisation."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.unit.conftest import nano_model, shapes_of, with_backend
from xar_scale.config import OptimConfig
from xar_scale.flow import velocity_loss
from xar_scale.model import apex
from xar_scale.model.layers import RMSNorm
from xar_scale.model.recompute import apply_recompute
from xar_scale.optim import create_adamw
from xar_scale.sampler import SAMPLERS, sample

SPEC = find_spec("apex")
has_apex = pytest.mark.skipif(
    SPEC is None or not (Path(next(iter(SPEC.submodule_search_locations or [""]))) / "optimizers").is_dir(),
    reason="needs NVIDIA's apex",
)


def loss_of(model, device):
    layout, generator = model.layout, torch.Generator(device).manual_seed(0)
    latents = torch.randn(2, 4, *layout.grid, device=device, generator=generator)
    noise = torch.randn(2, layout.tokens, 4, device=device, generator=generator)
    t = torch.rand(2, layout.entities, device=device, generator=generator)
    return velocity_loss(model, layout, latents, noise, t, torch.tensor([1, 2], device=device))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["dense", "masked", "prefix", "auto"])
@pytest.mark.parametrize("mode", ["full", "selective", "offload"])
def test_recomputation_with_dropout_changes_no_gradient(mode, backend, autocast, device):
    gradients = []
    for used in ("none", mode):
        model = with_backend(nano_model(grid=(16, 16), dropout=0.2).to(device).train(), backend)
        apply_recompute(model.blocks, used)
        torch.manual_seed(0)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model, device)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_recomputed_compiled_blocks_repeat_their_dropout(mode, device):
    gradients = []
    for used in ("none", mode):
        torch._dynamo.reset()
        model = nano_model(grid=(16, 16), dropout=0.2).to(device).train()
        apply_recompute(model.blocks, used, compiled=True)
        torch.manual_seed(0)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(model, device)
        loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["dense", "masked", "prefix", "flex", "auto"])
def test_compiled_blocks_give_the_same_loss_and_gradients(backend, autocast, device):
    model = with_backend(nano_model(grid=(16, 16)).to(device), backend)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        compare_compiled(model, device, 3e-2 if autocast else 1e-3)


def compare_compiled(model, device, tolerance):
    torch._dynamo.reset()
    expected = loss_of(model, device)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for block in model.blocks:
        block.compile(fullgraph=True)
    loss = loss_of(model, device)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= tolerance * gradient.norm() + 1e-6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_within_an_entity_the_host_never_waits(sampler, device, monkeypatch):
    """PyTorch raises on a synchronisation between an entity's first velocity and its end."""
    model, labels = nano_model().to(device), torch.tensor([1, 2])
    entity = SAMPLERS[sampler]

    def watched(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return entity.integrate(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    sample(model, labels, steps=3, guidance=2.0, sampler=sampler)  # one-time work is done
    monkeypatch.setitem(SAMPLERS, sampler, entity._replace(integrate=watched))
    sample(model, labels, steps=3, guidance=2.0, sampler=sampler)


@has_apex
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, False), (torch.float32, True)])
def test_apex_norm_matches_torch(dtype, autocast, affine, device):
    ours, theirs = RMSNorm(96, affine).to(device), RMSNorm(96, affine).to(device)
    theirs.library = "apex"
    x, gradient = (torch.randn(4, 7, 96, device=device, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        results = [(out := norm(x), torch.autograd.grad(out, x, gradient)[0]) for norm in (ours, theirs)]
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == dtype
        assert (one - other).norm() < (1e-2 if dtype is torch.bfloat16 else 1e-5) * one.norm()


@has_apex
def test_apex_adam_matches_torch(device):
    assert apex.choose_library("apex", device) == "apex"
    weights = []
    for library in ("torch", "apex"):
        model = nano_model().to(device)
        optimizer = create_adamw(
            dict(model.named_parameters()), shapes_of(model), OptimConfig(lr=1e-3, weight_decay=0.1), device, library
        )
        for _ in range(3):
            loss_of(model, device).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
