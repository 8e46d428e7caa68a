"""Activation checkpointing: the same numbers from less memory."""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import partitioners
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import random_batch
from tests.unit.conftest import loss_of, nano_model, with_backend
from xar_scale.flow import velocity_loss
from xar_scale.model import flash, recompute
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import create_model

MODES = ["full", "selective", "offload"]


def trained(mode: str, kind: str = "cell", backend: str = "auto", dropout: float = 0.2):
    """Return loss, gradients and bytes saved for the backward pass, of one pass with dropout on."""
    model = with_backend(nano_model(dropout=dropout, entity=kind).train(), backend)
    apply_recompute(model.blocks, mode)
    layout, batch, saved = model.layout, random_batch(0), {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    t = torch.rand(8, layout.entities, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(8, layout.tokens, 4, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = velocity_loss(model, layout, batch.latents, noise, t, batch.labels)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, sum(size for pointer, size in saved.items() if pointer not in parameters)


@pytest.mark.parametrize("kind", ["cell", "scale"])
@pytest.mark.parametrize("backend", ["dense", "masked", "prefix"])
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_match_those_without_recomputation(mode, kind, backend):
    loss, gradients, _ = trained("none", kind, backend)
    again, recomputed, _ = trained(mode, kind, backend)
    assert torch.equal(loss, again)
    assert [name for name in gradients if not torch.equal(gradients[name], recomputed[name])] == []


@torch.library.custom_op("xar_scale_tests::attention", mutates_args=())
def drawing(x: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Emulates a fused GPU kernel that draws its dropout inside."""
    drawing.calls += 1
    return x * (torch.rand_like(x) >= dropout_p) if dropout_p else x.clone()


drawing.calls = 0
drawing.register_fake(lambda x, dropout_p: torch.empty_like(x))
drawing.register_autograd(
    lambda ctx, gradient: (gradient * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward((output / inputs[0]).detach()),
)


@pytest.mark.parametrize(("dropout", "again"), [(0.0, 0), (0.3, 1)])
def test_selective_recomputes_a_kernel_that_draws(dropout, again, monkeypatch):
    """A kept kernel is not rerun: whatever draws after it would draw another mask than in the forward pass."""
    monkeypatch.setattr(recompute, "_KEPT", {torch.ops.xar_scale_tests.attention.default, *recompute._KEPT})

    class Layer(nn.Module):
        def forward(self, x):
            return F.dropout(drawing(x * 2, dropout), 0.5).sin()

    gradients = []
    for mode in ("none", "selective"):
        layer = Layer()
        apply_recompute([layer], mode)
        x = torch.linspace(1, 2, 100).requires_grad_()
        torch.manual_seed(0)
        out = layer(x).sum()
        drawing.calls = 0
        out.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    assert drawing.calls == again


@pytest.mark.parametrize(("dropout", "again"), [(0.0, 0), (0.3, 1)])
def test_selective_recomputes_flash_attention_only_where_it_draws(dropout, again, monkeypatch):
    launched = []
    monkeypatch.setattr(flash, "available", lambda _device: True)
    monkeypatch.setattr(flash, "_launch", lambda name, *_: launched.append(name))
    model = with_backend(nano_model(dropout=dropout).train(), "flash")
    apply_recompute(model.blocks, "selective")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert launched.count("forward") == (1 + again) * len(model.blocks)


def test_compiled_selective_blocks_keep_a_kernel_that_draws(monkeypatch):
    """A graph that recomputed it would, on a GPU, draw from a generator of its own: no seed would reach it."""
    launched, functionalized = [], []
    monkeypatch.setattr(flash, "available", lambda _device: True)
    monkeypatch.setattr(flash, "_launch", lambda name, *_: launched.append(name))
    monkeypatch.setattr(partitioners, "functionalize_rng_ops", lambda *given, **_: functionalized.append(1) or given[1:3])
    monkeypatch.setattr(recompute, "compile_static", partial(torch.compile, backend="aot_eager_decomp_partition"))
    model = with_backend(nano_model(dropout=0.3).train(), "flash")
    apply_recompute(model.blocks, "selective", compiled=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert launched.count("forward") == len(model.blocks) and not functionalized


class CountProducts(TorchDispatchMode):
    """Counts the product that only a Linear's forward pass makes: the one with a bias."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.addmm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "again"), [("none", False), ("full", True), ("selective", False), ("offload", True)])
def test_matrix_products_are_recomputed_unless_kept(mode, again):
    model = nano_model(depth_encoder=1, depth_decoder=1)
    apply_recompute(model.encoder, mode)
    out = model(torch.randn(2, 16, 4), torch.rand(2, 4), torch.tensor([1, 2])).sum()
    with CountProducts() as products:
        out.backward()
    assert (products.count > 0) == again


def test_offload_keeps_the_inputs_of_blocks_in_host_memory_and_nothing_else(monkeypatch):
    kept = []

    def to_host(pin_memory):
        assert pin_memory is False  # no GPU here
        return saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(recompute, "save_on_cpu", to_host)
    trained("offload")
    tokens, condition = (8, 16, 128), (8, 4, 128)  # of 8 images
    assert kept.count(tokens) == kept.count(condition) == 4  # blocks
    assert set(kept) <= {tokens, condition, (16, 16), ()}  # and rotary tables


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_falls_from_none_to_selective_to_full_to_offload_on_a_gpu():
    peaks = {}
    for mode in ("none", "selective", "full", "offload"):
        model = create_model("nano", width=512, heads=8).cuda()
        apply_recompute(model.blocks, mode)
        torch.cuda.reset_peak_memory_stats()
        x, t = torch.randn(64, 256, 16, device="cuda"), torch.rand(64, 4, device="cuda")
        model(x, t, torch.zeros(64, dtype=torch.int64, device="cuda")).sum().backward()
        peaks[mode] = torch.cuda.max_memory_allocated()
        del model
        gc.collect()  # a changed forward holds its own block
    assert peaks["none"] > peaks["selective"] > peaks["full"] > peaks["offload"]


def test_less_is_kept_for_the_backward_pass():
    everything, only_inputs = trained("none")[2], trained("full")[2]
    assert only_inputs < 0.5 * everything


def test_sampling_recomputes_nothing():
    model = nano_model()
    apply_recompute(model.encoder, "full")
    with torch.no_grad():
        out = model(torch.zeros(1, 16, 4), torch.zeros(1, 4), torch.tensor([0]), cache=model.new_cache(1))
    assert torch.equal(out, nano_model()(torch.zeros(1, 16, 4), torch.zeros(1, 4), torch.tensor([0])))
