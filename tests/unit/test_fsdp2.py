"""FSDP2 on one rank: what rests on private names of PyTorch's, which change from release to release."""

import pytest
import torch

from tests.conftest import digits_config, random_batch
from xar_scale.engines.fsdp2 import FSDP2Engine
from xar_scale.model.xar import initial_weights, meta_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def engine_in(precision: str) -> FSDP2Engine:
    config = digits_config("train.engine=fsdp2", f"train.precision={precision}", "train.global_batch=8")
    model = meta_model(config.model)
    return FSDP2Engine(model, initial_weights(model, 0), config, CPU)


@pytest.mark.parametrize(("first", "then"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_another_precision_is_that_of_an_engine_that_never_had_the_first(first, then):
    batch = [random_batch(0)]
    expected = engine_in(then).attempt(0, batch)
    engine = engine_in(first)
    other = engine.attempt(0, batch)
    engine.discard()
    engine.set_precision(then)
    found = engine.attempt(0, batch)
    assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm) != (other.loss, other.grad_norm)
