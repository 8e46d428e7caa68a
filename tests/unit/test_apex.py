"""NVIDIA's apex is distinguished from other packages of that name. Its kernels need a GPU (tests/gpu)."""

import sys

import pytest
import torch

from tests.conftest import digits_config
from tests.unit.conftest import nano_model, normal, shapes_of
from xar_scale.config import KernelConfig, OptimConfig
from xar_scale.engines import create_engine
from xar_scale.errors import ConfigError
from xar_scale.model.apex import choose_library
from xar_scale.model.layers import RMSNorm
from xar_scale.model.xar import initial_weights, meta_model
from xar_scale.optim import create_adamw

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder of installed packages, with a function that installs an importable file there."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(path: str, text: str = "") -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def nvidia(site) -> None:
    for path in ("apex/__init__.py", "apex/optimizers/__init__.py", "fused_layer_norm_cuda.py", "amp_C.py"):
        site(path, "raise AssertionError('imported')")


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_torch_is_used_unless_apex_is_named(site, wanted):
    nvidia(site)
    assert choose_library(wanted, CUDA) == "torch"


def test_apex_is_used_where_nvidias_is_installed(site):
    nvidia(site)
    assert choose_library("apex", CUDA) == "apex"
    assert "apex" not in sys.modules


def test_apex_is_refused_on_a_cpu(site):
    nvidia(site)
    with pytest.raises(ConfigError, match="kernels.library apex: its kernels need a CUDA device, this is cpu"):
        choose_library("apex", CPU)
    with pytest.raises(ConfigError, match="need a CUDA device"):
        nano_model().use_kernels(KernelConfig(library="apex"), CPU, torch.float32, training=True)


def test_an_absent_apex_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="kernels.library apex: not installed; build NVIDIA's from source"):
        choose_library("apex", CUDA)


@pytest.mark.parametrize("path", ["apex/__init__.py", "apex.py"])
def test_another_package_of_that_name_is_refused_with_the_reason_and_never_imported(site, path):
    """What `pip install apex` brings has no apex.optimizers."""
    site(path, "raise AssertionError('imported')")
    with pytest.raises(ConfigError, match=r"apex(\.py)? is not NVIDIA's apex, .*pip install apex.*; uninstall it"):
        choose_library("apex", CUDA)


@pytest.mark.parametrize(("built", "lacking"), [("fused_layer_norm_cuda", "amp_C"), ("amp_C", "fused_layer_norm_cuda")])
def test_an_apex_without_its_extensions_is_refused(site, built, lacking):
    site("apex/__init__.py")
    site("apex/optimizers/__init__.py")
    site(f"{built}.py")
    with pytest.raises(ConfigError, match=f"was built without its CUDA extension {lacking}"):
        choose_library("apex", CUDA)


def test_the_reason_is_the_package_before_the_device(site):
    site("apex/__init__.py")
    with pytest.raises(ConfigError, match="is not NVIDIA's apex"):
        choose_library("apex", CPU)


def test_every_norm_of_a_network_uses_apex(site):
    nvidia(site)
    model = nano_model()
    said = model.use_kernels(KernelConfig(library="apex"), CUDA, torch.float32, training=True)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert said.endswith("norms of apex") and {norm.library for norm in norms} == {"apex"}


FUSED = """
def fused_rms_norm(x, shape, eps):
    assert shape == x.shape[-1:] and eps == 1e-6
    return 2 * x
"""


@pytest.mark.parametrize("affine", [True, False])
def test_the_norm_of_apex_is_scaled_by_our_weight(site, affine):
    for path in ("apex/__init__.py", "apex/normalization/__init__.py"):
        site(path)
    site("apex/normalization/fused_layer_norm.py", FUSED)
    norm, x = RMSNorm(8, affine), normal(0, 3, 8)
    norm.library = "apex"
    if affine:
        norm.weight.data = normal(1, 8)
    assert torch.equal(norm(x), 2 * x * norm.weight if affine else 2 * x)


def test_the_adam_of_apex_gets_the_groups_and_settings_of_torchs(site):
    site("apex/__init__.py")
    site("apex/optimizers/__init__.py", "def FusedAdam(groups, **settings):\n    return groups, settings\n")
    model, config = nano_model(), OptimConfig(lr=0.3, betas=(0.8, 0.7), eps=1e-5, weight_decay=0.1)
    (decayed, plain), settings = create_adamw(
        dict(model.named_parameters()), shapes_of(model), config, torch.device("cpu"), "apex"
    )
    assert settings == {"lr": 0.3, "betas": (0.8, 0.7), "eps": 1e-5, "adam_w_mode": True}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_a_single_process_engine_does_not_ignore_apex(monkeypatch):
    asked = []
    monkeypatch.setattr("xar_scale.engines.single.choose_library", lambda *of: asked.append(of) or "torch")
    config = digits_config("train.engine=single", "kernels.library=apex")
    model = meta_model(config.model)
    create_engine(model, initial_weights(model, 0), config, CPU)
    assert asked == [("apex", CPU)]
