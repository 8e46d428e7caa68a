"""The global order, and each rank's slice of it."""

import pickle
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xar_scale.data.loader import RankBatchSampler
from xar_scale.data.order import Position, SampleOrder, Window

COUNTS = [5, 1, 8, 3]  # samples per shard


@st.composite
def orders(draw) -> SampleOrder:
    lanes = draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    window, seed = draw(st.integers(1, 12)), draw(st.integers(0, 2**32))
    return SampleOrder(counts, seed, window=window, global_batch=lanes * draw(st.integers(1, 4)), lanes=lanes)


def small_order(seed=0, counts=COUNTS, window=4, global_batch=6, lanes=3) -> SampleOrder:
    return SampleOrder(counts, seed, window=window, global_batch=global_batch, lanes=lanes)


def places(order: SampleOrder, numbers) -> list[tuple[int, int]]:
    shards, positions = order.locate(list(numbers))
    return list(zip(shards.tolist(), positions.tolist(), strict=True))


def lane_streams(order: SampleOrder, steps: int) -> list[list[tuple[int, int]]]:
    """What each lane reads in ``steps`` global batches, in its order."""
    share, batch = order.global_batch // order.lanes, order.global_batch
    read = places(order, range(steps * batch))
    return [
        [at for step in range(steps) for at in read[step * batch + lane * share : step * batch + (lane + 1) * share]]
        for lane in range(order.lanes)
    ]


def epochs(order: SampleOrder, count: int) -> list[list[list[tuple[int, int]]]]:
    """What each lane reads in each of the first epochs, from the documented lane lengths."""
    steps = (count + 1) * order.samples // order.global_batch + 2
    streams, found = lane_streams(order, steps), []
    for epoch in range(count):
        ends = [[(e * order.samples + lane) // order.lanes for e in (epoch, epoch + 1)] for lane in range(order.lanes)]
        found.append([stream[begin:end] for stream, (begin, end) in zip(streams, ends, strict=True)])
    return found


@settings(deadline=None, max_examples=100)
@given(orders())
def test_every_sample_comes_exactly_once_an_epoch_whatever_divides_what(order):
    everything = [(shard, place) for shard, count in enumerate(order.counts.tolist()) for place in range(count)]
    for lanes in epochs(order, 4):
        assert sorted(chain.from_iterable(lanes)) == everything
        assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


@settings(deadline=None, max_examples=50)
@given(orders(), st.integers(1, 40))
def test_no_sample_is_ever_more_than_two_ahead_of_another(order, steps):
    """At every step of the run, not only at the end of epochs."""
    read = places(order, range(steps * order.global_batch))
    times = [read.count((shard, place)) for shard, count in enumerate(order.counts.tolist()) for place in range(count)]
    assert max(times) - min(times) <= 2  # lanes differ by one sample, so a few may be in the next epoch already
    assert sum(times) == steps * order.global_batch


@settings(deadline=None, max_examples=100)
@given(orders())
def test_a_lane_is_one_run_of_the_shuffled_shards_and_shuffled_in_windows_only(order):
    # windows of one sample shuffle nothing: they show the shards' order
    plain = SampleOrder(order.counts, order.seed, window=1, global_batch=order.global_batch, lanes=order.lanes)
    for lanes, shuffled in zip(epochs(plain, 3), epochs(order, 3), strict=True):
        whole = list(chain.from_iterable(lanes))
        begun = [shard for shard, place in whole if place == 0]
        assert sorted(begun) == list(range(len(order.counts)))
        assert whole == [(shard, place) for shard in begun for place in range(order.counts[shard])]
        for lane, mixed in zip(lanes, shuffled, strict=True):
            for begin in range(0, len(lane), order.window):
                assert sorted(mixed[begin : begin + order.window]) == sorted(lane[begin : begin + order.window])


def test_epochs_and_seeds_differ_and_none_is_in_storage_order():
    storage = [(shard, place) for shard, count in enumerate(COUNTS) for place in range(count)]
    seen = [storage] + [list(chain.from_iterable(epoch)) for seed in (0, 1, 2) for epoch in epochs(small_order(seed), 5)]
    assert all(one != two for one, two in combinations(seen, 2))


def test_shards_lanes_and_windows_are_each_shuffled_by_epoch_and_seed():
    one_lane = dict(window=1, global_batch=1, lanes=1)
    assert len({str(epoch) for epoch in epochs(small_order(**one_lane), 20)}) > 10  # of 24 orders of shards
    assert len({str(epochs(small_order(seed, **one_lane), 1)) for seed in range(20)}) > 10
    order = small_order(counts=[80], window=20, global_batch=2, lanes=2)
    windows = [
        tuple(place - min(places_)[1] for _, place in places_)
        for epoch in epochs(order, 3)
        for lane in epoch
        for places_ in (lane[:20], lane[20:])
    ]
    assert len(set(windows)) == len(windows) == 12
    assert len({str(epochs(small_order(seed, counts=[80], window=20), 1)) for seed in range(20)}) == 20


@settings(deadline=None, max_examples=100)
@given(orders())
def test_windows_and_their_shards_are_those_that_samples_are_found_in(order):
    """From the first window of each lane, ``next_window`` visits everything that the lane reads."""
    steps = 3 * order.samples // order.global_batch + 2
    for lane, read in enumerate(lane_streams(order, steps)):
        share = order.global_batch // order.lanes
        numbers = [step * order.global_batch + lane * share + turn for step in range(steps) for turn in range(share)]
        own = [order.windows([number]) for number in numbers]
        (window,) = own[0]
        found = dict[Window, set[int]]()
        for (of_sample,), (shard, _) in zip(own, read, strict=True):
            if of_sample != window:
                assert found[window] == set(order.shards_in(window))
                window = order.next_window(window)
            assert of_sample == window
            found.setdefault(window, set()).add(shard)
        assert order.windows(numbers) == set(found)


def test_a_batch_takes_the_same_number_from_every_lane_and_a_lane_reads_few_shards():
    """Eight lanes over 64 shards of 10: a rank with one lane opens its eighth of the shards an epoch, and the edges'."""
    order = small_order(counts=[10] * 64, window=20, global_batch=16, lanes=8)
    for lane in lane_streams(order, 40):
        assert len(set(lane)) == 80 and len({shard for shard, _ in lane}) <= 9
        for step in range(0, 40, 10):  # twenty samples of a lane: one window
            assert len({shard for shard, _ in lane[2 * step : 2 * step + 20]}) <= 3


def test_numbers_may_be_asked_for_in_any_order_and_company():
    order, numbers = small_order(), list(range(100))
    forward = places(order, numbers)
    assert [places(order, [number])[0] for number in reversed(numbers)] == forward[::-1]
    assert places(order, numbers[::7]) == forward[::7]


def test_positions_count_epochs_and_samples():
    order = small_order()
    assert order.samples == 17
    assert [order.position(n) for n in (0, 16, 17, 40)] == [Position(0, 0), Position(0, 16), Position(1, 0), Position(2, 6)]


def test_an_order_survives_pickling_with_its_caches_filled():
    order = small_order(seed=7)
    expected = places(order, range(60))
    again = pickle.loads(pickle.dumps(order))
    assert places(again, range(60)) == expected
    assert len(pickle.dumps(order)) < 2000


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**9), st.integers(0, 2**32))
def test_far_positions_need_no_replay(step, seed):
    """A run of a billion steps of 2048: numbers beyond 32 bits, and lanes still in step."""
    order = SampleOrder(np.full(1250, 1024), seed, window=2048, global_batch=2048, lanes=128)
    shards, positions = order.locate(np.arange(step * 2048, (step + 1) * 2048))
    assert shards.min() >= 0 and shards.max() < 1250 and positions.min() >= 0 and positions.max() < 1024
    assert len(set(zip(shards.tolist(), positions.tolist(), strict=True))) > 2040  # a few may be of the next epoch


WORLDS = [1, 2, 3, 4, 6, 8, 12, 24]


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_ranks_together_read_every_global_batch_in_order_at_any_world_size(start, micro_batch):
    expected = list(range(start * 48, 7 * 48))
    for world in WORLDS:
        ranks = [
            list(RankBatchSampler(start=start, steps=7, global_batch=48, micro_batch=micro_batch, rank=rank, world=world))
            for rank in range(world)
        ]
        passes = 48 // world // micro_batch
        assert all(len(batch) == micro_batch for rank in ranks for batch in rank)
        together = [
            number
            for step in range(7 - start)
            for rank in ranks
            for batch in rank[step * passes : (step + 1) * passes]
            for number in batch
        ]
        assert together == expected


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 64, 1000])
def test_a_thousand_ranks_read_the_batches_that_one_reads_and_the_shards_of_their_lanes(world):
    """240 lanes over 2,400 shards of 100; 24,000 samples a batch."""
    order = SampleOrder([100] * 2400, seed=1, window=500, global_batch=24_000, lanes=240)
    whole = places(order, range(5 * 24_000, 6 * 24_000))
    share, of_rank = 24_000 // world, {}
    for rank in {0, 1, world // 2, world - 1} & set(range(world)):
        [numbers] = RankBatchSampler(start=5, steps=6, global_batch=24_000, micro_batch=share, rank=rank, world=world)
        of_rank[rank] = places(order, numbers)
        assert of_rank[rank] == whole[rank * share : (rank + 1) * share]
        lanes = -(-240 // world) + 1
        assert len({shard for shard, _ in of_rank[rank]}) <= 7 * lanes  # a window's, of each lane


def test_a_rank_knows_how_many_batches_it_has():
    numbers = RankBatchSampler(start=2, steps=7, global_batch=48, micro_batch=4, rank=1, world=3)
    assert len(numbers) == len(list(numbers)) == 5 * 4
