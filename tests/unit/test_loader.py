"""Batches: self-contained, the same for every number of workers and ranks, with the documented randomness."""

import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.conftest import digits_config
from tests.processes import wait_until_gone
from tests.unit.conftest import CPU, assert_equal, open_set, write_set
from xar_scale.data import loader, reader
from xar_scale.data.loader import Batch, LatentDataset, RankBatchSampler, batches, check_fits
from xar_scale.data.order import SampleOrder
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import Sample
from xar_scale.data.workers import from_workers, is_worker_death
from xar_scale.errors import ConfigError, ProcessError
from xar_scale.flow import sample_time


def read(*of, **more) -> list[Batch]:
    return list(stream(*of, **more))


def stream(folder, workers=0, *, start=0, steps=3, batch=6, micro=None, rank=0, world=1) -> Iterator[Batch]:
    micro = micro or batch // world
    numbers = RankBatchSampler(start=start, steps=steps, global_batch=batch, micro_batch=micro, rank=rank, world=world)
    more = (f"data.workers={workers}", f"train.global_batch={batch}", "data.lanes=3")
    dataset = open_set(folder, *more, "data.flip=true", "train.label_drop=0.3")
    return (batch for batch in batches(dataset, numbers, CPU, late_s=0.5) if batch is not None)  # as training reads them


class Slow:
    """Three items, of which the second takes a while."""

    def __len__(self):
        return 3

    def __getitem__(self, at):
        time.sleep(2.6 * (at == 1))
        return at


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wait_for_a_worker_is_interrupted_and_nothing_is_lost(workers):
    items = list(from_workers(Slow(), workers, late_s=1.0, batch_size=None))
    assert [item for item in items if item is not None] == [0, 1, 2]
    assert items.count(None) == 2 * workers


def test_a_thread_that_pins_memory_and_dies_is_reported_as_without_a_time_limit(monkeypatch):
    """PyTorch then only says that the time is over."""
    monkeypatch.setattr("torch.utils.data._utils.pin_memory._pin_memory_loop", lambda *_: None)
    for name, value in (("is_available", True), ("current_accelerator", None), ("current_device_index", 0)):
        monkeypatch.setattr(torch.accelerator, name, lambda value=value: value)
    with pytest.raises(RuntimeError, match="DataLoader timed out"):
        list(from_workers(Slow(), 1, late_s=0.5, batch_size=None, pin_memory=True))


def joined(parts: list[Batch]) -> Batch:
    return Batch.concatenate(parts)


@pytest.fixture
def folder(tmp_path):
    """A set with mirrored arrays."""
    write_set(tmp_path, 10, flipped=True)
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_do_not_change_a_bit(folder, workers):
    alone, many = read(folder), read(folder, workers)
    assert len(alone) == len(many) == 3
    for one, two in zip(alone, many, strict=True):
        assert_equal(one, two)


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_read_what_one_reads(folder, world, micro):
    by_rank = [read(folder, micro=micro, rank=rank, world=world) for rank in range(world)]
    passes = len(by_rank[0]) // 3
    for step, whole in enumerate(read(folder)):
        parts = [part for ranks in by_rank for part in ranks[step * passes : (step + 1) * passes]]
        assert_equal(joined(parts), whole)


def test_a_resumed_run_reads_the_same_batches(folder):
    assert_equal(joined(read(folder, start=2, steps=4)), joined(read(folder, steps=4)[2:]))


def test_a_run_goes_on_at_another_world_size_from_the_middle_of_an_epoch(folder):
    """Ten samples, batches of six: step 3 begins eight samples into the second epoch."""
    whole = read(folder, steps=7)
    resumed = [read(folder, workers=1, start=3, steps=7, rank=rank, world=3) for rank in range(3)]
    for step, parts in enumerate(zip(*resumed, strict=True)):
        assert_equal(joined(parts), whole[3 + step])


def test_a_large_batch_is_that_of_its_parts(folder, monkeypatch):
    dataset = open_set(folder, "data.flip=true")
    whole = dataset.__getitems__(range(20))
    monkeypatch.setattr(LatentDataset, "CHUNK", 6)
    assert_equal(dataset.__getitems__(range(20)), whole)


def test_a_sample_is_the_same_in_any_company(folder):
    dataset = open_set(folder, "data.flip=true", "train.label_drop=0.5")
    together = dataset.__getitems__(range(20))
    for number in (0, 7, 19):
        alone = dataset.__getitems__([number])
        assert_equal(dataset.__getitems__([3, number, 12]), joined([dataset.__getitems__([n]) for n in (3, number, 12)]))
        assert torch.equal(alone.noise[0], together.noise[number]) and torch.equal(alone.t[0], together.t[number])


def test_all_draws_of_a_sample_are_apart(folder):
    draws = open_set(folder).draw(range(2000))
    columns = [torch.from_numpy(draws.flip), torch.from_numpy(draws.label)]
    columns += [part.flatten(1)[:, at] for part in (draws.time, draws.noise, draws.posterior) for at in (0, 1, -1)]
    correlation = torch.corrcoef(torch.stack([column.double() for column in columns])) - torch.eye(len(columns))
    assert correlation.abs().max() < 0.1
    shapes = [tuple(part.shape) for part in (draws.time, draws.noise, draws.posterior)]
    assert shapes == [(2000, 4), (2000, 16, 4), (2000, 4, 4, 4)]


def test_a_batch_has_the_promised_shapes_and_types(folder):
    batch = read(folder)[0]
    assert batch.latents.shape == (6, 4, 4, 4) and batch.latents.dtype == torch.float32
    assert batch.labels.shape == (6,) and batch.labels.dtype == torch.int64
    assert batch.t.shape == (6, 4) and batch.t.dtype == torch.float32
    assert batch.noise.shape == (6, 16, 4) and batch.noise.dtype == torch.float32
    assert len(batch.keys) == 6


def test_a_sample_is_the_stored_one_at_its_place_in_the_order(tmp_path):
    written = {sample.key: sample for sample in write_set(tmp_path, 10)}
    dataset = open_set(tmp_path, "train.label_drop=0", "data.lanes=2")
    batch = dataset.__getitems__(list(range(20)))
    order = SampleOrder([4, 4, 2], seed=0, window=6, global_batch=128, lanes=2)
    places = list(zip(*(found.tolist() for found in order.locate(range(20))), strict=True))
    assert set(batch.keys) <= set(written)
    for number, key in enumerate(batch.keys):
        assert dataset.shards.read(*places[number]).key == key
        assert batch.labels[number] == written[key].label
        assert np.array_equal(batch.latents[number].numpy(), written[key].latent.astype(np.float32))


def test_time_and_noise_are_normal_and_new_each_time(tmp_path):
    write_set(tmp_path, 10)
    batch = open_set(tmp_path).__getitems__(list(range(2000)))
    assert ((batch.t > 0) & (batch.t < 1)).all()
    for values in (batch.t.logit(), batch.noise):
        assert values.mean().item() == pytest.approx(0, abs=0.05)
        assert values.std().item() == pytest.approx(1, abs=0.03)
        assert (values.abs() < 1).float().mean().item() == pytest.approx(0.683, abs=0.02)
        assert values.flatten(1).unique(dim=0).shape[0] == 2000
    # entities and tokens of a sample are drawn apart, and time apart from noise
    for columns in (
        batch.t.logit(),
        batch.noise.flatten(1)[:, :8],
        torch.stack([batch.t[:, 0].logit(), batch.noise[:, 0, 0]], 1),
    ):
        correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
        assert correlation.abs().max() < 0.1


def test_times_go_through_the_flow_s_distribution(tmp_path, monkeypatch):
    write_set(tmp_path, 10)
    dataset = open_set(tmp_path)
    expected = dataset.__getitems__([5]).t
    monkeypatch.setattr(loader, "sample_time", lambda normal: normal)
    assert torch.equal(sample_time(dataset.__getitems__([5]).t), expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_set_share_by_sample_number(tmp_path, share):
    write_set(tmp_path, 10)
    dataset = open_set(tmp_path, f"train.label_drop={share}")
    labels = dataset.__getitems__(list(range(2000))).labels
    assert (labels == 10).float().mean().item() == pytest.approx(share, abs=0.03)
    for number in (0, 7, 1500):
        assert dataset.__getitems__([number]).labels[0] == labels[number]


def test_all_randomness_changes_with_the_seed(folder):
    numbers = list(range(40))
    one, two = (open_set(folder, "train.label_drop=0.5", f"train.seed={seed}").__getitems__(numbers) for seed in (0, 1))
    assert one.keys != two.keys
    assert not torch.equal(one.labels == 10, two.labels == 10)
    assert not (one.t == two.t).any() and not (one.noise == two.noise).any()


def test_flip_takes_the_mirrored_array_half_of_the_time_and_only_when_on(tmp_path):
    written = {sample.key: sample for sample in write_set(tmp_path, 10, flipped=True)}
    numbers = list(range(1000))
    plain = open_set(tmp_path).__getitems__(numbers)
    flipping = open_set(tmp_path, "data.flip=true").__getitems__(numbers)
    mirrored = {key: [] for key in written}
    for number, key in enumerate(plain.keys):
        image, mirror = (array.astype(np.float32) for array in (written[key].latent, written[key].flipped))
        got = flipping.latents[number].numpy()
        mirrored[key].append(np.array_equal(got, mirror))
        assert np.array_equal(plain.latents[number].numpy(), image)
        assert mirrored[key][-1] or np.array_equal(got, image)
    assert sum(map(sum, mirrored.values())) / 1000 == pytest.approx(0.5, abs=0.06)
    assert all(0 < sum(times) < len(times) for times in mirrored.values())  # drawn anew each epoch, not once per sample


def posterior(tmp_path, mean: float, log_variance: float, scale: float) -> LatentDataset:
    """A set of one stored posterior of 4 channels, with the given mean and log variance everywhere."""
    stored = np.concatenate([np.full((4, 4, 4), value, np.float32) for value in (mean, log_variance)])
    samples = [Sample("s", 0, stored, None)]
    write_set(tmp_path, samples=samples, shape=(8, 4, 4), dtype="float32", stored="moments", latent_scale=scale)
    return open_set(tmp_path)


def test_latents_are_drawn_from_the_stored_posterior_and_scaled(tmp_path):
    dataset = posterior(tmp_path, 3.0, 2 * np.log(0.5), 0.25)
    latents = dataset.__getitems__(list(range(500))).latents
    assert latents.shape == (500, 4, 4, 4) and latents.dtype == torch.float32
    assert latents.mean().item() == pytest.approx(0.25 * 3.0, abs=0.01)
    assert latents.std().item() == pytest.approx(0.25 * 0.5, rel=0.03)
    assert latents.flatten().unique().numel() > 31_000  # drawn anew for every sample number and value


@pytest.mark.parametrize(("stored", "counted"), [(50.0, 20.0), (-100.0, -30.0), (20.0, 20.0), (-29.0, -29.0)])
def test_the_log_variance_is_clipped(tmp_path, stored, counted):
    latents = posterior(tmp_path, 0.0, stored, 1.0).__getitems__(list(range(100))).latents
    assert latents.std().item() == pytest.approx(np.exp(0.5 * counted), rel=0.05)


def test_the_posterior_noise_is_not_the_flow_noise(tmp_path):
    dataset = posterior(tmp_path, 0.0, 0.0, 1.0)
    batch = dataset.__getitems__(list(range(20)))
    assert not (batch.latents.flatten(1) == batch.noise.flatten(1)).any()


def test_stored_latents_are_scaled(tmp_path):
    written = write_set(tmp_path, 1, latent_scale=0.5)
    latents = open_set(tmp_path).__getitems__([0]).latents
    assert np.array_equal(latents[0].numpy(), 0.5 * written[0].latent.astype(np.float32))


def test_a_set_that_does_not_fit_the_model_is_refused_with_both_numbers(tmp_path):
    write_set(tmp_path)
    info = LatentShards(tmp_path).info
    path = f"data.path={tmp_path}"
    with pytest.raises(ConfigError, match=rf"latents in {tmp_path} are \(4, 4, 4\) .*, the model expects \(16, 4, 4\)"):
        check_fits(info, digits_config(path, "model.channels=16"))
    with pytest.raises(ConfigError, match=r"are \(4, 4, 4\) .*, the model expects \(4, 8, 4\)"):
        check_fits(info, digits_config(path, "model.grid=[8, 4]"))
    with pytest.raises(ConfigError, match=r"10 classes, model.classes is 9"):
        check_fits(info, digits_config(path, "model.classes=9"))
    with pytest.raises(ConfigError, match=f"data.flip is on, but {tmp_path} holds no mirrored latents"):
        check_fits(info, digits_config(path, "data.flip=true"))
    check_fits(info, digits_config(path, "model.classes=11"))
    with pytest.raises(ConfigError, match="model.classes is 9"):  # also checked when it is opened
        open_set(tmp_path, "model.classes=9")


def kill_one() -> None:
    """SIGKILL a worker of the loader in use."""
    workers = [child for child in multiprocessing.active_children() if child.is_alive()]
    assert workers
    os.kill(workers[0].pid, signal.SIGKILL)


def test_a_killed_worker_loses_nothing_and_repeats_nothing(folder, capfd):
    """Killed repeatedly, at random moments: the batches are those of an undisturbed run."""
    more = dict(steps=40, batch=6)
    undisturbed = read(folder, **more)
    seen, kills = [], random.Random().sample(range(1, 38), 3)
    for batch in stream(folder, workers=2, **more):
        seen.append(batch)
        if len(seen) in kills:
            kill_one()
    assert len(seen) == 40
    for one, two in zip(seen, undisturbed, strict=True):
        assert_equal(one, two)
    assert 1 <= capfd.readouterr().err.count("; restarting its data workers") <= 3  # two that die together count once


def test_workers_that_die_now_and_then_do_not_end_it(folder, monkeypatch):
    """Nor is the process interrupted in what it does then, whichever loaders existed before."""
    list(DataLoader([1], num_workers=1))
    monkeypatch.setattr(loader, "MAX_DEATHS", 2)
    seen = 0
    for _ in stream(folder, workers=1, steps=12):
        seen += 1
        if seen in (2, 5, 8):
            kill_one()
            time.sleep(0.2)
    assert seen == 12


def test_starting_workers_draws_from_no_generator_that_dropout_draws_from(folder):
    """They may be started in the middle of a step, and restarted when one dies."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    read(folder, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_killed_rank_leaves_no_workers(folder, monkeypatch):
    # the interval after which they check for their parent by themselves
    monkeypatch.setattr("torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL", 1000.0)

    def rank() -> None:
        batches_ = stream(folder, workers=2, steps=40)
        next(batches_)
        pipe.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(60)

    ours, pipe = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    workers = ours.recv()
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    wait_until_gone(workers, 60)


def test_a_worker_that_starts_after_its_rank_was_killed_ends(folder, monkeypatch):
    """PyTorch takes the process that adopted the worker for its parent, and waits for that to end."""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(ProcessError, match="a data worker died"):
        read(folder, workers=1)


def test_keys_of_any_kind_travel(folder):
    batch = replace(read(folder)[0], keys=("a", "", "ü b\nc", "d"))
    packed = loader._packed(batch)
    assert packed[0].keys == () and len(pickle.dumps(packed[0].faults)) < 100
    assert loader._unpacked(packed).keys == batch.keys


def test_workers_that_die_again_and_again_end_the_run(folder, monkeypatch, capfd):
    monkeypatch.setattr(loader, "MAX_DEATHS", 2)
    monkeypatch.setattr(LatentDataset, "__getitems__", lambda self, numbers: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ProcessError, match=r"rank 2: a data worker died: DataLoader worker .*, 2 times in a row") as caught:
        read(folder, workers=1, rank=2, world=3)
    assert caught.value.rank == 2  # only this rank has met it, so it reports it
    assert capfd.readouterr().err.count("restarting its data workers") == 1


@pytest.mark.parametrize("kind", [RuntimeError, OSError, EOFError])
def test_a_defect_in_a_worker_is_no_death(folder, monkeypatch, kind):
    def fail(self, numbers):
        raise kind("a defect")

    monkeypatch.setattr(LatentDataset, "__getitems__", fail)
    for workers in (1, 0):
        with pytest.raises(kind, match="a defect"):
            read(folder, workers=workers)


@pytest.mark.parametrize(
    ("where", "dead"), [("in pin memory thread for device 0", True), ("in DataLoader worker process 1", False)]
)
def test_a_thread_that_pins_meets_deaths_too(where, dead):
    """As PyTorch forwards errors, from the thread that fetches batches on CUDA and from a worker itself."""
    for kind in (EOFError, ConnectionRefusedError):
        try:
            raise kind
        except (OSError, EOFError):
            wrapped = torch._utils.ExceptionWrapper(where=where)
        with pytest.raises(kind) as caught:
            wrapped.reraise()
        assert is_worker_death(caught.value) is dead


def test_as_many_shards_stay_open_as_the_lanes_go_around(tmp_path, monkeypatch):
    """A shard that is closed between two visits must read its index each time."""
    write_set(tmp_path, 400, per_shard=2)
    monkeypatch.setattr(LatentShards, "open_shards", 1)
    opened = []
    open_ = reader._OpenShard.__init__
    monkeypatch.setattr(reader._OpenShard, "__init__", lambda self, *of: opened.append(of[-1]) or open_(self, *of))
    dataset = open_set(tmp_path, "data.lanes=16", "train.global_batch=16")  # windows of six: three shards, four at their edges
    assert dataset.shards.open_shards == 16 * 4
    for step in range(18):
        dataset.__getitems__(range(16 * step, 16 * step + 16))
    assert len(set(opened)) > 100 and len(opened) < 1.1 * len(set(opened))  # edges of lanes are met twice


def test_a_rank_keeps_shards_of_its_own_lanes_open(tmp_path, monkeypatch):
    write_set(tmp_path, 399, per_shard=2)  # the last holds one
    monkeypatch.setattr(LatentShards, "open_shards", 1)
    for world, lanes in ((4, 4), (3, 6), (16, 1), (32, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert open_set(tmp_path, "data.lanes=16", "train.global_batch=96").shards.open_shards == lanes * 4


@pytest.mark.parametrize("name", ["latents", "noise", "t"])
def test_each_input_that_is_not_finite_is_seen(folder, name):
    batch = read(folder)[0]
    assert batch.inputs_sum().isfinite()
    getattr(batch, name).view(-1)[-1] = float("nan")
    assert not batch.inputs_sum().isfinite()


def test_a_dataset_can_be_pickled_to_a_worker(folder):
    dataset = open_set(folder)
    expected = dataset.__getitems__([1, 2, 3])
    assert_equal(pickle.loads(pickle.dumps(dataset)).__getitems__([1, 2, 3]), expected)


def test_moving_a_batch_keeps_everything(folder, monkeypatch):
    batch = read(folder)[0]
    assert_equal(batch.to(CPU), batch)
    moved = batch.to(torch.device("meta"))
    on = {name: tensor.device.type for name, tensor in vars(moved).items() if torch.is_tensor(tensor)}
    assert on.pop("places") == "cpu"  # used on the host
    assert set(on.values()) == {"meta"}
    assert moved.keys == batch.keys
    waits = []
    monkeypatch.setattr("xar_scale.data.loader.Tensor.to", lambda tensor, device, non_blocking: waits.append(not non_blocking))
    batch.to(CPU)
    batch.to(torch.device("cuda"))
    assert waits == 4 * [True] + 4 * [False]  # a host must not read what has not arrived; a device reads in order
    monkeypatch.setattr("xar_scale.data.loader.Tensor.pin_memory", lambda tensor: tensor.clone())  # pinning needs a GPU
    assert_equal(batch.pin_memory(), batch)
    assert batch.pin_memory().noise is not batch.noise
