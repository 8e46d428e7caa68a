"""Images generated on a GPU match those of a CPU, up to rounding."""

import numpy as np
import pytest
import torch

from tests.unit.tiny_run import Run
from xar_scale.checkpoint.manifest import verify
from xar_scale.evaluate.generate import open_generator
from xar_scale.evaluate.trained import open_trained

FEW = ["sample.sampler=heun", "sample.steps=5", "sample.batch=8"]
LABELS = [number % 10 for number in range(20)]


@pytest.fixture
def checkpoint(tmp_path):
    run = Run(tmp_path)
    run.train(5)
    return verify(run.save()).path


@pytest.mark.parametrize(("precision", "off"), [("fp32", 1), ("tf32", 4), ("bf16", 24)])
def test_images_match_those_of_a_cpu(checkpoint, device, precision, off):
    trained = open_trained(checkpoint, [*FEW, f"sample.precision={precision}"])
    exact = open_generator(open_trained(checkpoint, [*FEW, "sample.precision=fp32"]), torch.device("cpu")).draw(LABELS, 3)
    generator = open_generator(trained, device)
    found = generator.draw(LABELS, 3)
    assert generator.model.forward.__self__._graphs._captured
    assert np.quantile(np.abs(found.astype(int) - exact), 0.99) <= off
