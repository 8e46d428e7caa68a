"""Self-contained training batches: latents and all their randomness, drawn in worker processes."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from xar_scale import dist, rng
from xar_scale.config import Config
from xar_scale.data.faults import Fault
from xar_scale.data.order import SampleOrder, Window
from xar_scale.data.reader import ShardError
from xar_scale.data.shards import DatasetInfo
from xar_scale.data.sources import Shards, max_lanes_read
from xar_scale.data.workers import DeadWorkerError, from_workers
from xar_scale.errors import ConfigError, DataError, FileError, ProcessError, XarScaleError
from xar_scale.flow import sample_time
from xar_scale.model.entities import EntityLayout
from xar_scale.tokenizers.kl16 import MAX_LOG_VARIANCE, MIN_LOG_VARIANCE

Place = tuple[int, int]  # the number of a shard, and of a sample in it

MAX_DEATHS = 5  # of data workers, without a batch in between
MAX_OPEN_SHARDS = 512  # half of the usual limit of 1,024 open files per process


@dataclass(frozen=True)
class Batch:
    """Everything that a forward-backward pass needs: replaying it needs no random generator."""

    latents: Tensor  # (B, C, rows, columns)
    labels: Tensor  # (B,) int64, the null class where dropped
    t: Tensor  # (B, K)
    noise: Tensor  # (B, T, C), entity-major
    keys: tuple[str, ...]  # of the samples in it: the substitute's, if a sample could not be read
    places: Tensor  # (B, 2) int64, of the same samples: the number of the shard, and of the sample in it
    faults: tuple[Fault, ...] = ()  # samples that could not be read; all ranks together decide about the step

    @classmethod
    def zeros(cls, layout: EntityLayout, channels: int, size: int, device: torch.device | None = None) -> Self:
        """Return ``size`` samples of zeros."""
        return cls(
            latents=torch.zeros(size, channels, *layout.grid, device=device),
            labels=torch.zeros(size, dtype=torch.int64, device=device),
            t=torch.zeros(size, layout.entities, device=device),
            noise=torch.zeros(size, layout.tokens, channels, device=device),
            keys=("",) * size,
            places=torch.zeros(size, 2, dtype=torch.int64),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return one batch made of several."""
        latents, labels, t, noise, places = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "labels", "t", "noise", "places")
        )
        keys = tuple(key for part in parts for key in part.keys)
        return cls(latents, labels, t, noise, keys, places, tuple(fault for part in parts for fault in part.faults))

    def inputs_sum(self) -> Tensor:
        """Return a number that is finite if all inputs of the network are."""
        return self.latents.sum() + self.noise.sum() + self.t.sum()

    def split(self, parts: int) -> list["Batch"]:
        """Split into ``parts`` equal batches, which must divide this one's size. The parts carry no faults."""
        size, rest = divmod(len(self.labels), parts)
        assert not rest, f"{len(self.labels)} samples in {parts} parts"
        columns = (tensor.split(size) for tensor in (self.latents, self.labels, self.t, self.noise, self.places))
        keys = (self.keys[first : first + size] for first in range(0, len(self.keys), size))
        return [
            Batch(latents, labels, t, noise, names, places)
            for latents, labels, t, noise, places, names in zip(*columns, keys, strict=True)
        ]

    def to(self, device: torch.device) -> "Batch":
        to_gpu = device.type == "cuda"  # the other way the host would read values before they have arrived
        return self._each(lambda tensor: tensor.to(device, non_blocking=to_gpu))

    def pin_memory(self) -> "Batch":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        latents, labels, t, noise = (change(tensor) for tensor in (self.latents, self.labels, self.t, self.noise))
        return Batch(latents, labels, t, noise, self.keys, self.places, self.faults)


class Draws(NamedTuple):
    """All randomness of some samples, from one block of words each (xar_scale.rng)."""

    flip: np.ndarray  # (B,) uniform
    label: np.ndarray  # (B,) uniform
    time: Tensor  # (B, K) normal
    noise: Tensor  # (B, T, C) normal
    posterior: Tensor  # (B, C, rows, columns) normal


class LatentDataset(Dataset[Batch]):
    """Sample numbers of the run -> a batch. All randomness is keyed by the sample number."""

    CHUNK = 64  # samples drawn and read together: their numbers and arrays fit a core's cache

    def __init__(self, shards: Shards, config: Config, layout: EntityLayout) -> None:
        check_fits(shards.info, config)
        self.shards, self.config, self.layout = shards, config, layout
        self.order = SampleOrder(
            [shard.samples for shard in shards.info.shards],
            config.train.seed,
            window=config.data.window,
            global_batch=config.train.global_batch,
            lanes=config.data.lanes,
        )
        # a rank cycles through the windows of its lanes, and opening a shard is slow
        at_once = max_lanes_read(config.data.lanes, dist.world(), 1) * shards.info.max_shards_spanned(config.data.window)
        self._prefetched = set[Window]()
        self.quarantined = set[Place]()  # replaced by substitutes
        self._unreadable = set[tuple[int, int, bool]]()  # arrays that failed as substitutes; not tried again
        self._store_error: FileError | None = None  # the error of an unreachable storage
        shards.open_shards = min(max(shards.open_shards, at_once), MAX_OPEN_SHARDS)

    def quarantine(self, places: Iterable[Place]) -> None:
        """Replace these samples by substitutes, in streams opened from now on."""
        self.quarantined |= set(places)

    def names_of(self, places: Iterable[Place]) -> list[tuple[str, int]]:
        """Return the places with shard names instead of numbers, as a checkpoint stores them."""
        return [(self.shards.info.shards[shard].name, position) for shard, position in places]

    def places_of(self, names: Iterable[tuple[str, int]]) -> list[Place]:
        """Return the places with shard numbers instead of names."""
        numbers = {shard.name: number for number, shard in enumerate(self.shards.info.shards)}
        return [(numbers[name], position) for name, position in names]

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """Return the batch of these sample numbers. Samples that cannot be read are in ``faults``, and replaced if a budget
        allows bad samples."""
        if self.shards.remote:
            self._prefetch(numbers)
        parts = [self._part(numbers[begin : begin + self.CHUNK]) for begin in range(0, len(numbers), self.CHUNK)]
        return parts[0] if len(parts) == 1 else Batch.concatenate(parts)

    def blank(self, size: int, error: XarScaleError) -> Batch:
        """Return a batch of zeros in place of ``size`` samples that did not arrive. Its fault ends the run with ``error``."""
        return replace(Batch.zeros(self.layout, self.config.model.channels, size), faults=(Fault("", 0, error, fatal=True),))

    def _prefetch(self, numbers: Sequence[int]) -> None:
        """Prefetch the shards of windows that have started, then those of the windows after them."""
        windows = self.order.windows(numbers)
        started = sorted(windows - self._prefetched)
        coming = (*started, *(self.order.next_window(window) for window in started))
        self.shards.prefetch([shard for window in coming for shard in self.order.shards_in(window)])
        self._prefetched = windows

    def _part(self, numbers: Sequence[int]) -> Batch:
        model, draws = self.config.model, self.draw(numbers)
        flip = ((draws.flip < 0.5) & self.config.data.flip).tolist()
        stored = np.empty((len(numbers), *self.shards.info.shape), self.shards.info.dtype)
        keys, labels, faults = [""] * len(numbers), np.zeros(len(numbers), dtype=np.int64), dict[int, Fault]()
        replaced = list[int]()
        places = list(zip(*(found.tolist() for found in self.order.locate(numbers)), strict=True))
        for row, place in enumerate(places):
            if place in self.quarantined:
                replaced.append(row)
                stored[row] = 0
                continue
            try:
                keys[row], labels[row], stored[row] = self._read(place, flipped=flip[row])
            except DataError as error:
                faults[row], stored[row] = self._fault(place, error), 0
            except FileError as error:  # the other samples are on the same storage: the step will not be taken
                faults[row], stored[row:] = self._fault(place, error, fatal=True), 0
                break
        latents = torch.from_numpy(stored).float()
        # a sum is finite if all its terms are, unless they are far larger than any latent; if it is not, check each
        for row in torch.isfinite(latents.sum(dim=(1, 2, 3))).logical_not_().nonzero().flatten().tolist():
            if not np.isfinite(stored[row]).all():
                faults[row], latents[row] = self._fault(places[row], self._not_finite(places[row], keys[row])), 0
        # without a budget any fault is one too many: the step will not be taken, so no substitute is needed
        if self.config.data.max_bad_samples:
            replaced += [row for row, fault in faults.items() if not fault.fatal]
        for row in replaced:
            place = places[row]
            try:
                places[row], keys[row], labels[row], array = self._substitute(place, flipped=flip[row])
                latents[row] = torch.from_numpy(array.astype(np.float32))
            except (DataError, FileError) as error:
                faults[row] = self._fault(place, error, fatal=True)
        labels[draws.label < self.config.train.label_drop] = model.classes
        return Batch(
            latents=self._latents(latents, draws.posterior),
            labels=torch.from_numpy(labels),
            t=sample_time(_row_by_row(draws.time)).contiguous(),
            noise=draws.noise,
            keys=tuple(keys),
            places=torch.tensor(places),
            faults=tuple(faults.values()),
        )

    def _read(self, place: Place, *, flipped: bool) -> tuple[str, int, np.ndarray]:
        """Return key, label and array. An unreachable store is tried once: an attempt may take minutes, and the run ends."""
        if self._store_error is not None:
            raise self._store_error
        try:
            return self.shards.read_array(*place, flipped=flipped)
        except FileError as error:
            self._store_error = error
            raise

    def _substitute(self, place: Place, *, flipped: bool) -> tuple[Place, str, int, np.ndarray]:
        """Return the next readable sample in storage order. Raises DataError if there is none."""
        for shard, positions in self._after(place):
            for position in positions:
                if (shard, position) in self.quarantined or (shard, position, flipped) in self._unreadable:
                    continue
                try:
                    key, label, array = self._read((shard, position), flipped=flipped)
                    if np.isfinite(array).all():
                        return (shard, position), key, label, array
                except ShardError:
                    break
                except DataError:
                    pass
                self._unreadable.add((shard, position, flipped))
        raise DataError(f"no sample of {self.config.data.path} can be read")

    def _after(self, place: Place) -> Iterator[tuple[int, range]]:
        """Yield all other places, in storage order after this one: (shard, positions in it)."""
        shards = self.shards.info.shards
        shard, position = place
        yield shard, range(position + 1, shards[shard].samples)
        for other in (*range(shard + 1, len(shards)), *range(shard)):
            yield other, range(shards[other].samples)
        yield shard, range(position)

    def _fault(self, place: Place, error: XarScaleError, *, fatal: bool = False) -> Fault:
        return Fault(self.shards.info.shards[place[0]].name, place[1], error, fatal)

    def _not_finite(self, place: Place, key: str) -> DataError:
        name = self.shards.info.shards[place[0]].name
        return DataError(f"shard {name} of {self.config.data.path}, sample {key} (number {place[1]}): its array is not finite")

    def _latents(self, stored: Tensor, noise: Tensor) -> Tensor:
        """Return scaled latents (B, C, rows, columns), sampled from the posterior if the set stores moments."""
        if self.shards.info.stored == "moments":
            mean, log_variance = stored.chunk(2, dim=1)
            deviation = log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE).mul_(0.5).exp_()
            stored = deviation.mul_(noise).add_(mean)
        return stored.mul_(self.shards.info.latent_scale)

    def draw(self, numbers: Sequence[int]) -> Draws:
        """Draw one block of words per number: two for the uniforms, then those of the normals, two per word."""
        model, layout = self.config.model, self.layout
        shapes = [(layout.entities,), (layout.tokens, model.channels), (model.channels, *model.grid)]
        ends = list(accumulate((math.ceil(math.prod(shape) / 2) for shape in shapes), initial=2))
        words = self._words(numbers, ends[-1])
        flip, label = rng.uniforms(words[:, :2]).T
        time, noise, posterior = (  # each in separate memory: views of one tensor would have to be copied
            rng.normals(words[:, begin:end])[:, : math.prod(shape)].unflatten(1, shape)
            for (begin, end), shape in zip(pairwise(ends), shapes, strict=True)
        )
        return Draws(flip, label, time, noise, posterior)

    def _words(self, numbers: Sequence[int], size: int) -> np.ndarray:
        """Return ``size`` words per number. Consecutive numbers are drawn together."""
        ends = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
        words = [
            rng.words(self.config.train.seed, "sample", int(numbers[begin]), end - begin, size)
            for begin, end in pairwise([0, *ends, len(numbers)])
        ]
        return words[0] if len(words) == 1 else np.concatenate(words)


def _row_by_row(rows_BK: Tensor) -> Tensor:
    """Return the same values with a gap after each row. PyTorch's sigmoid rounds the last values of contiguous memory
    differently; with the gap, every row ends the same way, whatever follows it."""
    count, width = rows_BK.shape
    return rows_BK.new_empty(count, width + 1)[:, :width].copy_(rows_BK)


def check_fits(info: DatasetInfo, config: Config) -> None:
    """Raises ConfigError if the model does not fit these latents."""
    model = config.model
    if info.latent_shape != (model.channels, *model.grid):
        raise ConfigError(
            f"latents in {config.data.path} are {info.latent_shape} (channels, rows, columns), "
            f"the model expects {(model.channels, *model.grid)}"
        )
    if info.classes > model.classes:
        raise ConfigError(f"the data set has {info.classes} classes, model.classes is {model.classes}")
    if config.data.flip and not info.flipped:
        raise ConfigError(f"data.flip is on, but {config.data.path} holds no mirrored latents")


class RankBatchSampler(Sequence[list[int]]):
    """The sample numbers of one rank's micro-batches, from step ``start`` on: a contiguous slice of every global batch."""

    def __init__(self, *, start: int, steps: int, global_batch: int, micro_batch: int, rank: int, world: int) -> None:
        self.start, self.steps, self.global_batch, self.micro_batch = start, steps, global_batch, micro_batch
        self.rank, self.share = rank, global_batch // world

    def __len__(self) -> int:
        return (self.steps - self.start) * (self.share // self.micro_batch)

    def __getitem__(self, number: Any) -> Any:
        """Return the sample numbers of micro-batch ``number``."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        step, turn = divmod(number, self.share // self.micro_batch)
        first = (self.start + step) * self.global_batch + self.rank * self.share + turn * self.micro_batch
        return list(range(first, first + self.micro_batch))


def batches(
    dataset: LatentDataset, numbers: RankBatchSampler, device: torch.device, late_s: float = 0.0
) -> Iterator[Batch | None]:
    """Yield the rank's batches in order, prefetched by worker processes; if ``late_s`` is set, also None after every ``late_s``
    seconds that workers are waited for. The batches do not depend on the number of workers.

    If a worker dies (killed for memory, for example), all restart and resume where they were: the content of a batch follows
    from its numbers alone. Raises ProcessError if they die ``MAX_DEATHS`` times without a batch in between.
    """
    settings = dataset.config.data
    ahead: dict[str, Any] = {"prefetch_factor": settings.prefetch} if settings.workers else {}
    taken = deaths = 0
    while taken < len(numbers):
        stream = from_workers(
            dataset,
            settings.workers,
            batch_sampler=map(numbers.__getitem__, range(taken, len(numbers))),
            collate_fn=_packed,
            pin_memory=device.type == "cuda",
            late_s=late_s,
            **ahead,
        )
        try:
            for packed in stream:
                if packed is None:
                    yield None
                    continue
                taken, deaths = taken + 1, 0
                yield _unpacked(packed).to(device)
        except DeadWorkerError as death:
            deaths += 1
            if deaths == MAX_DEATHS:
                error = ProcessError(f"rank {numbers.rank}: {death}, {deaths} times in a row")
                error.rank = numbers.rank
                raise error from None
            print(f"rank {numbers.rank}: {death}; restarting its data workers", file=sys.stderr, flush=True)


def _packed(batch: Any) -> tuple[Batch, Tensor]:
    """Move the keys into shared memory as bytes. That keeps the message to the parent process small enough for one write, so
    no worker can die halfway through it."""
    text = "".join(f"{key}\0" for key in batch.keys)
    return replace(batch, keys=()), torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _unpacked(packed: Any) -> Batch:
    batch, text = packed
    return replace(batch, keys=tuple(bytes(text.numpy()).decode().split("\0")[:-1]))
