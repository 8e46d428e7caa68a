"""Everything here needs a CUDA device: ``pytest -m gpu``."""

from pathlib import Path

import pytest
import torch

from xar_scale.precision import apply_matmul_mode

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def exact():
    """Engines set the process's mode, and leave it."""
    apply_matmul_mode("fp32")


@pytest.fixture(params=["highest", "high"], ids=["fp32", "tf32"])
def matmul(request, exact):
    """The float32 matmul mode; "high" is TF32."""
    torch.set_float32_matmul_precision(request.param)
    return request.param
