"""NVIDIA's apex is told from others of its name. Its kernels themselves need a GPU (tests/gpu)."""

import sys

import pytest
import torch

from tests.unit.conftest import nano_model
from xar_scale.config import KernelConfig
from xar_scale.errors import ConfigError
from xar_scale.model.apex import choose_library

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
    sys.modules.pop("apex", None)


def nvidia(site) -> None:
    for path in ("apex/__init__.py", "apex/optimizers/__init__.py", "fused_layer_norm_cuda.py", "amp_C.py"):
        site(path, "raise AssertionError('imported')")


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_torch_is_used_unless_apex_is_asked_for(site, wanted):
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
    with pytest.raises(ConfigError, match="kernels.library apex: it is not installed"):
        choose_library("apex", CUDA)


@pytest.mark.parametrize("path", ["apex/__init__.py", "apex.py"])
def test_another_package_of_that_name_is_refused_with_the_reason_and_never_imported(site, path):
    """What `pip install apex` brings has no apex.optimizers."""
    site(path, "raise AssertionError('imported')")
    with pytest.raises(ConfigError, match=r"apex(\.py)? is not NVIDIA's apex, .*pip install apex.*; uninstall it"):
        choose_library("apex", CUDA)


def test_an_apex_without_its_extensions_is_refused(site):
    site("apex/__init__.py")
    site("apex/optimizers/__init__.py")
    site("fused_layer_norm_cuda.py")
    with pytest.raises(ConfigError, match="was built without its CUDA extension amp_C"):
        choose_library("apex", CUDA)
