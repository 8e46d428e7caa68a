"""Counter-based randomness: a draw depends on (seed, purpose, n) only."""

import itertools
import math

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


def test_the_words_of_a_number_do_not_depend_on_the_batch():
    whole = rng.words(3, "sample", 0, 50, 7)
    assert whole.shape == (50, 7) and whole.dtype == np.uint64 and len(np.unique(whole)) == 350
    assert np.array_equal(rng.words(3, "sample", 17, 5, 7), whole[17:22])
    far = 2**62 // 7  # numbers that no run reaches
    assert np.array_equal(rng.words(3, "sample", far + 1, 1, 7)[0], rng.words(3, "sample", far, 3, 7)[1])
    for other in (rng.words(4, "sample", 0, 50, 7), rng.words(3, "other", 0, 50, 7), rng.words(3, "sample", far, 50, 7)):
        assert not np.intersect1d(whole, other).size


def test_the_words_of_a_number_never_change_between_versions():
    assert rng.words(7, "sample", 3, 1, 2).tolist() == [[5428518703053333681, 3423377959787233614]]


def test_uniforms_are_uniform():
    drawn = rng.uniforms(rng.words(0, "sample", 0, 100_000, 1))
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.histogram(drawn, bins=10, range=(0, 1))[0] == pytest.approx(np.full(10, 10_000), rel=0.05)
    assert rng.uniforms(np.array([0, 2**64 - 1], dtype=np.uint64)).tolist() == [0, 1 - 2**-53]


def test_normals_are_normal_far_into_the_tails():
    drawn = rng.normals(rng.words(0, "sample", 0, 100, 50_000)).double()
    assert drawn.shape == (100, 100_000)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        assert (drawn**power).mean().item() == pytest.approx(moment, abs=0.02 * max(moment, 0.1))
    for bound in (1, 2, 3, 4, 5):
        expected = math.erfc(bound / math.sqrt(2))
        assert (drawn.abs() > bound).double().mean().item() == pytest.approx(expected, rel=4 / math.sqrt(1e7 * expected))
    assert abs(torch.corrcoef(torch.stack([drawn[:, :50_000].flatten(), drawn[:, 50_000:].flatten()]))[0, 1]) < 2e-3


def test_normals_are_finite_for_every_word():
    extremes = np.array([[0, 2**31, 2**32 - 1, 2**64 - 1, 2**63, 2**63 - 1]], dtype=np.uint64)
    for words in (extremes, extremes[:, ::-1].copy()):
        assert torch.isfinite(rng.normals(words)).all()
    assert rng.normals(extremes).max().item() == pytest.approx(5.42, abs=0.01)
    assert rng.normals(extremes[:, ::-1].copy()).min().item() == pytest.approx(-5.42, abs=0.01)


@pytest.mark.parametrize("size", [1, 2, 9, 100])
def test_normals_of_a_number_are_the_same_bits_in_any_batch(size):
    together = rng.normals(rng.words(0, "sample", 0, 70, size))
    for first, count in ((0, 1), (3, 5), (64, 6)):
        assert torch.equal(rng.normals(rng.words(0, "sample", first, count, size)), together[first : first + count])
