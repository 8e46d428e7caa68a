"""Copies in host memory, of any tensors, without overlap."""

import torch

from xar_scale.staging import ALIGNED, Staging

TENSORS = [
    torch.randn(5, 3),
    torch.tensor(2.0, dtype=torch.float64),
    torch.empty(0),  # a rank's empty shard
    torch.arange(7, dtype=torch.int16),
    torch.randn(4, 6).t(),
]


def test_copies_are_of_the_moment_and_do_not_overlap():
    staging, now = Staging(TENSORS), [tensor.clone() for tensor in TENSORS]
    given = [tensor.clone() for tensor in now]
    staging.take(given)
    staging.wait()
    for tensor in given:
        tensor.zero_()
    assert [copy.dtype for copy in staging.copies] == [tensor.dtype for tensor in now]
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(staging.copies, now, strict=True))
    assert all(copy.data_ptr() % ALIGNED == 0 for copy in staging.copies)


def test_nothing_to_copy():
    assert Staging([]).copies == [] and [*map(len, Staging([torch.empty(0)]).copies)] == [0]
