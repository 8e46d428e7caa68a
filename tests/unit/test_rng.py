"""Counter-based randomness: a draw is a function of (seed, purpose, n) and of nothing else."""

import itertools

import numpy as np
import pytest
import torch

from xar_scale import rng

KEYS = list(itertools.product([0, 1, 2**40], ["noise", "time"], [0, 1, 2**33]))


def _bits(key: tuple[int, str, int], count: int = 8) -> tuple[int, ...]:
    return tuple(rng.generator(*key).integers(0, 2**63, count).tolist())


def test_the_same_key_draws_the_same():
    for key in KEYS:
        assert _bits(key) == _bits(key)
        assert rng.torch_seed(*key) == rng.torch_seed(*key)
        first, second = (torch.randn(5, generator=rng.torch_generator(*key)) for _ in range(2))
        assert torch.equal(first, second)


def test_the_values_of_a_key_never_change_between_versions():
    drawn = rng.generator(7, "noise", 3).bit_generator.random_raw(3).tolist()
    assert drawn == [11047347690896178763, 15757071540191511820, 8631977052704477019]


def test_keys_that_differ_in_any_part_draw_differently():
    assert len({_bits(key) for key in KEYS}) == len(KEYS)
    assert len({rng.torch_seed(*key) for key in KEYS}) == len(KEYS)
    assert [rng.torch_generator(*key).initial_seed() for key in KEYS] == [rng.torch_seed(*key) for key in KEYS]


@pytest.mark.parametrize("other", [1, 2, 1000, 2**32, 2**63])
def test_the_streams_of_two_numbers_do_not_overlap(other):
    one, two = (set(_bits((0, "noise", n), 20_000)) for n in (0, other))
    assert len(one) == len(two) == 20_000 and not one & two


def test_number_zero_is_the_default():
    assert _bits((3, "init", 0)) == tuple(rng.generator(3, "init").integers(0, 2**63, 8).tolist())


def test_torch_seeds_fit_a_torch_generator():
    seeds = [rng.torch_seed(0, "init", n) for n in range(200)]
    assert min(seeds) >= 0 and 2**60 < max(seeds) < 2**63


def test_no_global_state_is_read_or_touched():
    before, torch_before = np.random.get_state(), torch.get_rng_state()
    drawn = _bits((0, "noise", 1)), rng.torch_generator(0, "noise", 1).initial_seed()
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch_before, torch.get_rng_state())
    try:
        np.random.seed(1)
        torch.manual_seed(1)
        assert drawn == (_bits((0, "noise", 1)), rng.torch_generator(0, "noise", 1).initial_seed())
    finally:
        np.random.set_state(before)
        torch.set_rng_state(torch_before)
