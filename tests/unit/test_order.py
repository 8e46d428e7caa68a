"""The global order, and the slice of it that each rank reads."""

import itertools
import pickle
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xar_scale.data.loader import RankNumbers
from xar_scale.data.order import Position, SampleOrder

COUNTS = [5, 1, 8, 3]  # samples a shard


def epoch(order: SampleOrder, number: int) -> list[tuple[int, int]]:
    return [order.locate(n) for n in range(number * order.samples, (number + 1) * order.samples)]


orders = {
    "counts": st.lists(st.integers(1, 9), min_size=1, max_size=6),
    "window": st.integers(1, 40),
    "seed": st.integers(0, 2**32),
    "number": st.integers(0, 5),
}


@settings(deadline=None, max_examples=100)
@given(**orders)
def test_every_sample_comes_exactly_once_an_epoch(counts, window, seed, number):
    everything = [(shard, place) for shard, count in enumerate(counts) for place in range(count)]
    assert sorted(epoch(SampleOrder(counts, seed, window), number)) == everything


@settings(deadline=None, max_examples=100)
@given(**orders)
def test_a_window_holds_one_run_of_the_shuffled_shards(counts, window, seed, number):
    # windows of one sample shuffle nothing: they show the shards' order
    shards = epoch(SampleOrder(counts, seed, 1), number)
    assert [place for _, places in itertools.groupby(shards, lambda at: at[0]) for _, place in places] == [
        place for shard, _ in itertools.groupby(shards, lambda at: at[0]) for place in range(counts[shard])
    ]
    shuffled = epoch(SampleOrder(counts, seed, window), number)
    for begin in range(0, len(shards), window):
        assert sorted(shuffled[begin : begin + window]) == sorted(shards[begin : begin + window])


def test_epochs_and_seeds_differ_and_none_is_in_storage_order():
    storage = [(shard, place) for shard, count in enumerate(COUNTS) for place in range(count)]
    seen = [storage] + [epoch(SampleOrder(COUNTS, seed, 6), number) for seed in (0, 1, 2) for number in range(5)]
    assert all(one != two for one, two in itertools.combinations(seen, 2))


def test_shards_and_windows_are_both_shuffled_by_epoch_and_seed():
    shard_orders = {tuple(epoch(SampleOrder(COUNTS, 0, 1), number)) for number in range(20)}
    assert len(shard_orders) > 10  # of 24
    assert len({tuple(epoch(SampleOrder(COUNTS, seed, 1), 0)) for seed in range(20)}) > 10
    assert len({tuple(epoch(SampleOrder([20], seed, 20), 0)) for seed in range(20)}) == 20
    one_shard = [epoch(SampleOrder([40], 0, 20), number) for number in range(3)]
    inside = [tuple(place % 20 for _, place in order[half * 20 : half * 20 + 20]) for order in one_shard for half in (0, 1)]
    assert len(set(inside)) == 6  # each window of each epoch has its own order


def test_a_window_may_be_larger_than_the_set():
    order = SampleOrder(COUNTS, 0, 8192)
    assert len(set(epoch(order, 0))) == sum(COUNTS)


def test_the_order_does_not_depend_on_what_was_asked_before():
    order = SampleOrder(COUNTS, 3, 4)
    forward = [order.locate(n) for n in range(100)]
    backward = [order.locate(n) for n in reversed(range(100))]
    assert forward == backward[::-1] == [SampleOrder(COUNTS, 3, 4).locate(n) for n in range(100)]


def test_the_position_of_a_sample_number():
    order = SampleOrder(COUNTS, 0, 4)
    assert order.samples == 17
    assert [order.position(n) for n in (0, 16, 17, 40)] == [(0, 0), (0, 16), (1, 0), (2, 6)]
    assert isinstance(order.position(40), Position) and order.position(40).consumed == 6


def test_an_order_can_be_pickled_to_a_worker():
    order = SampleOrder(COUNTS, 3, 4)
    order.locate(20)
    again = pickle.loads(pickle.dumps(order))
    assert [again.locate(n) for n in range(60)] == [order.locate(n) for n in range(60)]


def steps_of(world: int, micro: int | None, *, start=0, steps=5, batch=48) -> list[list[list[int]]]:
    """Sample numbers by step and rank."""
    share = batch // world
    by_rank = []
    for rank in range(world):
        numbers = RankNumbers(start=start, steps=steps, global_batch=batch, micro_batch=micro or share, rank=rank, world=world)
        passes = list(numbers)
        assert len(numbers) == len(passes) and all(len(one) == (micro or share) for one in passes)
        each = share // (micro or share)
        by_rank.append([list(chain(*passes[at : at + each])) for at in range(0, len(passes), each)])
    return [list(step) for step in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_all_ranks_together_read_the_same_global_batches(world, micro):
    together = [list(chain(*ranks)) for ranks in steps_of(world, micro)]
    assert together == [list(range(48 * step, 48 * step + 48)) for step in range(5)]


@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_a_resumed_run_reads_the_rest(world, micro):
    assert steps_of(world, micro, start=3) == steps_of(world, micro)[3:]
    assert steps_of(world, micro, start=5) == []
