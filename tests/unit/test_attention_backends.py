"""Which attention backend is chosen, what is refused and why, and what each backend passes to which kernel."""

import shutil
import sys
import sysconfig
from functools import partial

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from tests.unit.attention_inputs import BACKENDS, LAYOUTS, naive, qkv
from tests.unit.conftest import CPU, nano_model, normal, unequal_layout
from xar_scale.config import KernelConfig
from xar_scale.errors import ConfigError
from xar_scale.model import attention, flash
from xar_scale.model.attention import block_causal_attention, choose_backend


@pytest.mark.parametrize(
    ("entity", "grid", "expected"),
    [
        ("cell", (16, 16), "prefix"),
        ("scale", (16, 16), "prefix"),
        ("patch", (16, 16), "dense"),
        ("cell", (4, 4), "dense"),
        ("cell", (8, 8), "prefix"),  # 16 tokens each
        ("subsample", (6, 10), "dense"),  # 15
    ],
)
def test_long_entities_get_a_call_each_and_short_ones_one_product(monkeypatch, entity, grid, expected):
    layout = nano_model(entity=entity, grid=grid).layout
    used = []
    monkeypatch.setattr(attention, "_FUNCTIONS", {name: lambda *_, name=name: used.append(name) for name in BACKENDS})
    for backend in ("auto", *BACKENDS):
        block_causal_attention(*qkv(layout), layout, backend=backend)
    assert used == [expected, *BACKENDS]


@pytest.mark.parametrize(
    ("device", "dtype", "backward", "expected"),
    [
        ("cpu", torch.bfloat16, True, "prefix"),
        ("cpu", torch.bfloat16, False, "prefix"),
        ("cpu", torch.float32, True, "prefix"),
        ("cuda", torch.bfloat16, True, "flash"),
        ("cuda", torch.bfloat16, False, "masked"),
        ("cuda", torch.float32, True, "masked"),
    ],
)
def test_the_choice_depends_on_device_dtype_and_backward(device, dtype, backward, expected, monkeypatch):
    monkeypatch.setattr(flash, "triton", "installed")
    monkeypatch.setattr(flash, "_builds", lambda: True)
    layout = nano_model(grid=(16, 16)).layout
    assert choose_backend(layout, torch.device(device), dtype, 64, dropout=0.0, backward=backward) == expected
    assert choose_backend(layout, torch.device(device), dtype, 64, dropout=0.0, backward=backward, backend="prefix") == "prefix"


def test_on_a_gpu_a_single_entity_has_nothing_to_mask():
    kind = torch.device("cuda"), torch.bfloat16, 64
    for entity, expected in (("image", "prefix"), ("patch", "masked"), ("scale", "masked")):
        assert choose_backend(nano_model(entity=entity).layout, *kind, dropout=0.0, backward=False) == expected


def test_flash_is_chosen_where_usable_and_refused_elsewhere(monkeypatch):
    monkeypatch.setattr(flash, "triton", "installed")
    monkeypatch.setattr(flash, "_builds", lambda: True)
    layout, cuda = LAYOUTS["equal"], torch.device("cuda")
    choose = partial(choose_backend, layout, dropout=0.1, backward=True)
    for width, expected in ((8, "masked"), (16, "flash"), (128, "flash"), (136, "masked")):
        assert choose(cuda, torch.bfloat16, width) == expected
    assert choose(cuda, torch.float16, 80, backend="flash") == "flash"
    assert choose(cuda, torch.float32, 80, backend="flash") == "masked"  # the guard's fallback to TF32
    assert attention.describe("flash", cuda, torch.bfloat16, 80) == "flash (this project's, in Triton)"
    with pytest.raises(ConfigError, match="flash takes heads of 16 to 128 channels, not 136"):
        choose(cuda, torch.bfloat16, 136, backend="flash")
    with pytest.raises(ConfigError, match=r"flash needs Triton, a C compiler, .* and an NVIDIA GPU .*; use masked"):
        choose(CPU, torch.bfloat16, 80, backend="flash")


@pytest.mark.parametrize("lacks", ["Triton", "compiler", "NVIDIA", "capability"])
def test_flash_is_refused_without_its_requirements(lacks, monkeypatch):
    monkeypatch.setattr(flash, "triton", None if lacks == "Triton" else "installed")
    monkeypatch.setattr(flash, "_builds", lambda: lacks != "compiler")
    monkeypatch.setattr(torch.version, "hip", "6.4" if lacks == "NVIDIA" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if lacks == "capability" else (8, 0))
    choose = partial(choose_backend, LAYOUTS["equal"], torch.device("cuda", 0), torch.float16, 64, dropout=0.0, backward=True)
    assert choose() == "masked"
    with pytest.raises(ConfigError, match=f"flash needs {flash.REQUIREMENTS}"):
        choose(backend="flash")


@pytest.mark.parametrize("lacks", ["nothing", "headers", "compiler"])
def test_a_kernel_launcher_needs_a_compiler_and_headers(lacks, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None if lacks == "compiler" else f"/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    if lacks != "headers":
        (tmp_path / "Python.h").touch()
    assert flash._builds.__wrapped__() == (lacks == "nothing")


def test_inside_a_graph_availability_is_the_last_answer_from_outside(monkeypatch):
    """A network without ``use_kernels`` may be compiled whole, and then the first check of the GPU is inside the graph."""
    monkeypatch.setattr(flash, "triton", "installed")
    monkeypatch.setattr(flash, "_builds", lambda: True)
    monkeypatch.setattr(flash, "_found", {})
    choose = partial(choose_backend, LAYOUTS["equal"], torch.device("cuda", 0), torch.float16, 64, dropout=0.0, backward=True)
    with monkeypatch.context() as graph:
        graph.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choose() == "masked" and choose(backend="flash") == "flash"
    assert choose() == "flash"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose() == "flash"


@pytest.mark.parametrize(
    ("layout", "first", "last"), [(LAYOUTS["equal"], 0, 3), (unequal_layout(), 0, 3), (unequal_layout(), 1, 2)]
)
def test_flash_gets_the_number_of_keys_per_query(layout, first, last, monkeypatch):
    q, k, v = qkv(layout, first, last)

    def reference(q, k, v, ends, dropout):
        assert ends.dtype == torch.int32 and dropout == 0.0
        hidden = torch.arange(k.shape[2]) >= ends[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden)

    monkeypatch.setattr(flash, "flash_attention", reference)
    out = attention._FUNCTIONS["flash"](q, k, v, layout, first, 0.0)
    torch.testing.assert_close(out, naive(q, k, v, layout, first), atol=1e-13, rtol=0)


@pytest.mark.parametrize(
    ("queries", "keys", "learning", "cudnn"),
    [(256, 256, True, True), (64, 256, True, False), (128, 192, True, False), (64, 192, False, True)],
)
def test_with_gradients_cudnn_is_used_for_whole_tiles_only(queries, keys, learning, cudnn, monkeypatch):
    seen = []
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: seen.append(allowed()))
    with FakeTensorMode(), torch.device("cuda"):
        q, k = torch.empty(1, 1, queries, 64, requires_grad=learning), torch.empty(1, 1, keys, 64)
    attention._sdpa(q, k, k)
    assert seen == [cudnn]


def test_an_unusable_backend_is_refused_with_the_reason():
    layout = LAYOUTS["equal"]
    q, k, v = qkv(layout, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"flex has no dropout, model.dropout is 0.1; use flash, masked, prefix or dense"):
        block_causal_attention(q, k, v, layout, backend="flex", dropout=0.1)
    with pytest.raises(ConfigError, match="flex has no backward pass on a CPU; use masked, prefix or dense"):
        block_causal_attention(q.requires_grad_(), k, v, layout, backend="flex")
    flex = partial(choose_backend, layout, torch.device("cuda"), torch.bfloat16, backward=True, backend="flex")
    assert flex(16, dropout=0.0) == "flex"
    with pytest.raises(ConfigError, match="dropout"):
        flex(16, dropout=0.1)
    with pytest.raises(ConfigError, match="flex takes heads of at least 16 channels, not 12"):
        flex(12, dropout=0.0)


def test_a_model_uses_the_named_backend_in_every_block_and_logs_it():
    model = nano_model(dropout=0.1)
    for backend, says in (
        ("dense", "attention dense"),
        ("prefix", "attention prefix (PyTorch scaled_dot_product_attention)"),
    ):
        said = model.use_kernels(KernelConfig(attention=backend), CPU, torch.float32, training=True)
        assert {block.attn.backend for block in model.blocks} == {backend}
        assert said.startswith(says) and said.endswith("norms of torch")
    with pytest.raises(ConfigError, match="flex has no dropout, model.dropout is 0.1"):
        model.use_kernels(KernelConfig(attention="flex"), CPU, torch.float32, training=True)
    said = model.use_kernels(KernelConfig(attention="flex"), CPU, torch.float32, training=False)  # dropout is off there
    assert said.startswith("attention flex") and model.encoder[0].attn.backend == "flex"


def test_flex_is_refused_before_training_on_a_cpu():
    with pytest.raises(ConfigError, match="flex has no backward pass on a CPU"):
        nano_model().use_kernels(KernelConfig(attention="flex"), CPU, torch.float32, training=True)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_the_blocks_of_a_network_call_the_backend_named(backend, monkeypatch):
    model, used = nano_model(), []
    model.use_kernels(KernelConfig(attention=backend), CPU, torch.float32, training=False)

    def recorded(name, function):
        return lambda *arguments: used.append(name) or function(*arguments)

    functions = {name: recorded(name, function) for name, function in attention._FUNCTIONS.items()}
    monkeypatch.setattr(attention, "_FUNCTIONS", functions)
    model(normal(0, 1, 16, 4, dtype=torch.float32), torch.full((1, 4), 0.5), torch.tensor([1]))
    assert used == [backend] * 4


def test_prefix_is_one_call_an_entity_fed(monkeypatch):
    layout, lengths, kernel = unequal_layout(), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *kv, **_: lengths.append(q.shape[2]) or kernel(q, *kv))
    block_causal_attention(*qkv(layout, first=1, last=2), layout, first=1, backend="prefix")
    assert lengths == [3, 2]


def test_masked_is_one_call_and_has_no_mask_where_nothing_is_hidden(monkeypatch):
    layout, calls, kernel = unequal_layout(), [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *kv, **how: calls.append((q.shape[2], how)) or kernel(q, *kv, **how)
    )
    for first, last in ((1, 2), (2, 2)):
        block_causal_attention(*qkv(layout, first, last), layout, first=first, backend="masked")
    (length, how), (last_length, last_how) = calls
    assert (length, last_length) == (5, 2) and last_how["attn_mask"] is None
    assert how["attn_mask"].tolist() == [[True] * 4 + [False] * 2] * 3 + [[True] * 6] * 2


def test_the_kernel_is_described():
    cuda = torch.device("cuda")
    for backend, device, says in (
        ("dense", cuda, "dense (a mask and a softmax)"),
        ("masked", cuda, "masked (PyTorch scaled_dot_product_attention)"),
        ("flex", cuda, "flex (PyTorch's FlexAttention, compiled)"),
        ("flex", CPU, "flex (PyTorch's FlexAttention, not compiled)"),
    ):
        assert attention.describe(backend, device, torch.bfloat16, 80) == says


def test_flex_masks_are_cached(monkeypatch):
    layout, made, create = unequal_layout(), [], flex_attention.create_block_mask
    monkeypatch.setattr(
        flex_attention, "create_block_mask", lambda *a, **settings: made.append(a[3:5]) or create(*a, **settings)
    )
    for first in (0, 1, 0, 1):
        block_causal_attention(*qkv(layout, first), layout, first=first, backend="flex")
    assert made == [(10, 10), (9, 10)]


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Installs a package called flash_attn with this text in it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(text: str | None) -> None:
        (tmp_path / "flash_attn").mkdir()
        if text is not None:
            (tmp_path / "flash_attn" / "__init__.py").write_text(text)

    yield install
    sys.modules.pop("flash_attn", None)


def test_flash_attn_is_found_where_it_is_installed(installed):
    assert attention._find_flash_attn() is None
    installed("def flash_attn_func():\n    return 'called'")
    assert attention._find_flash_attn()() == "called"


def test_a_folder_of_its_name_is_not_flash_attn(installed):
    installed(None)
    assert attention._find_flash_attn() is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ImportError('undefined symbol:\\n  _ZN3c10')", "undefined symbol: _ZN3c10"),
        ("import absent_dependency", "No module named 'absent_dependency'"),
        ("", "cannot import name 'flash_attn_func'"),
    ],
)
def test_a_broken_flash_attn_is_an_error(installed, text, reason, monkeypatch):
    installed(text)
    found = attention._find_flash_attn()
    assert found.startswith("flash_attn is installed and cannot be used: ") and reason in found
    monkeypatch.setattr(attention, "_FLASH_ATTN", found)
    with pytest.raises(ConfigError, match="flash_attn is installed and cannot be used.*; uninstall it"):
        attention.describe("prefix", torch.device("cuda"), torch.bfloat16, 80)
    assert "PyTorch" in attention.describe("prefix", torch.device("cuda"), torch.float32, 80)  # not usable there anyway


def as_flash_attn(q_BTNH, k_BTNH, v_BTNH, dropout_p):
    """What flash_attn computes, and its order of dimensions; the real one needs a GPU (tests/gpu)."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BTNH, k_BTNH, v_BTNH))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2)


def test_prefix_uses_flash_attn_where_possible(monkeypatch):
    monkeypatch.setattr(attention, "_FLASH_ATTN", as_flash_attn)
    cuda = torch.device("cuda")
    for dtype, head_width, device, serves in (
        (torch.bfloat16, 80, cuda, True),
        (torch.float16, 256, cuda, True),
        (torch.float32, 80, cuda, False),
        (torch.bfloat16, 257, cuda, False),
        (torch.bfloat16, 80, CPU, False),
    ):
        kernel = "flash_attn" if serves else "PyTorch scaled_dot_product_attention"
        assert attention.describe("prefix", device, dtype, head_width) == f"prefix ({kernel})"


def test_prefix_selects_flash_attn_by_its_inputs_and_calls_it_once_per_entity(monkeypatch):
    asked, lengths = [], []
    monkeypatch.setattr(attention, "_flash_attn_serves", lambda *of: asked.append(of) or True)
    monkeypatch.setattr(attention, "_FLASH_ATTN", lambda q, k, v, dropout_p: lengths.append((q.shape[1], k.shape[1])) or q)
    layout = LAYOUTS["unequal"]
    block_causal_attention(*qkv(layout), layout, backend="prefix")
    assert asked == [(CPU, torch.float64, 4)] and lengths == [(1, 1), (3, 4), (2, 6), (4, 10)]


@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attn_gets_tokens_before_heads_and_is_part_of_a_graph(monkeypatch, compiled):
    monkeypatch.setattr(attention, "_FLASH_ATTN", as_flash_attn)
    monkeypatch.setattr(attention, "_flash_attn_serves", lambda *_: True)
    layout = LAYOUTS["unequal"]
    layout.on(CPU)
    attend = torch.compile(block_causal_attention, backend="eager", fullgraph=True) if compiled else block_causal_attention
    out = attend(*qkv(layout), layout, backend="prefix")
    torch.testing.assert_close(out, block_causal_attention(*qkv(layout), layout, backend="dense"), atol=1e-13, rtol=0)
    if not compiled:
        with pytest.raises(RuntimeError, match="dropout probability"):  # the argument arrives
            attend(*qkv(layout), layout, backend="prefix", dropout=1.5)
