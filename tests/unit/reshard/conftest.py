"""Checkpoints to convert: our own and one of DeepSpeed's."""

import pytest

from tests.unit.foreign_checkpoints import random_state, values, write_zero3
from tests.unit.tiny_run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("own"))
    run.train(2)
    run.save()
    return run


@pytest.fixture
def own(run):
    return run.store.newest


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """A ZeRO-3 checkpoint after 5 steps, of which its moments have seen 4."""
    folder = tmp_path_factory.mktemp("foreign") / "zero"
    write_zero3(folder, random_state("model", "exp_avg", "exp_avg_sq"))
    return folder


@pytest.fixture
def state(own):
    return values(own)
