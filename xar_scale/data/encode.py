"""Encode images into a set of latents, with any number of processes; each can be stopped and restarted at any time.

Until the set is complete, its folder holds a folder ``.encoding``: the plan (the content of every shard), and a record of each
finished shard. Processes share nothing else: there is no process group, so none waits for one that has died.
"""

import itertools
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from xar_scale import dist, rng
from xar_scale.data.decode import DecodeDataset, decode_batches
from xar_scale.data.images import CROP, SourceImage, list_images
from xar_scale.data.plan import EncodeSettings, Plan
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import (
    DATASET_FILE,
    ENCODING,
    INDEX,
    DatasetInfo,
    ShardBuilder,
    ShardInfo,
    create_set_folder,
    shard_name,
    write_dataset_file,
)
from xar_scale.data.storage import LocalFolder
from xar_scale.errors import ConfigError, DataError, UsageError, XarScaleError
from xar_scale.files import locked, parse_json, sync_folder, write_atomically
from xar_scale.tokenizers import Tokenizer, check_origin

PREFIX = "latents"
PLAN, NOTE = "plan.json", "ended-rank-"
RECORD, BAD_RECORD = ".json", ".bad.json"  # suffixes of a shard's name: the latter if bad images were left out
POLL_S, SCAN_S = 0.5, 5.0  # between scans for the records of other processes: while waiting, while working
SCAN_REST = 20  # at least this many times the duration of a scan pass between two: the folder may hold 100,000 records


class Reporter:
    """Receives messages and progress. This one ignores them."""

    def log(self, line: str) -> None: ...

    def progress(self, done: int, total: int, bad: int) -> None:
        """``done`` of ``total`` images are processed, by all processes; ``bad`` of them are left out."""


def encode_set(
    out: Path, settings: EncodeSettings, tokenizer: Tokenizer, *, workers: int, max_bad: int, reporter: Reporter
) -> DatasetInfo | None:
    """Encode this process's shards, resuming where it stopped. Rank 0 also lists the images and completes the set.

    Return the description of the complete set: on rank 0, and on any rank that finds it complete; None on the others.
    ``workers`` is the number of decoding processes, ``max_bad`` the number of images that may be left out.
    Raises UsageError if ``out`` holds a set, or part of one, made with other settings, if it is inside the source, and if
    another process writes it as this rank; DataError if the source is not a set of images, and if more than ``max_bad`` are
    bad; ProcessError if a decoding process dies.
    """
    rank, world = dist.rank(), dist.world()
    if not 0 <= rank < world:
        raise UsageError(f"RANK {rank} is not from 0 to WORLD_SIZE - 1, WORLD_SIZE is {world}")
    if (info := finished_set(out, settings)) is not None:
        return info
    blank = np.zeros((1, tokenizer.image_channels, settings.size, settings.size), np.uint8)
    # raises for a size that does not fit, before any work
    _, channels, rows, columns = tokenizer.encode(blank, settings.dtype, strict=False).shape
    check_origin(settings.tokenizer, tokenizer.stored, channels)
    if not Path(settings.source).is_dir():
        raise UsageError(f"no folder at {settings.source}")
    if out.resolve().is_relative_to(Path(settings.source).resolve()):  # the output folder would count as a class
        raise UsageError(f"{out} is the source {settings.source}, or inside it: write elsewhere")
    notes = _ErrorNotes(out, rank, world)
    with notes.write_on_error(), ExitStack() as stack:
        if rank == 0:
            (out / ENCODING).mkdir(parents=True, exist_ok=True)
            stack.enter_context(_rank_lock(out, rank, reporter))
        plan = _plan(out, settings, notes, reporter)
        if plan is None:
            return finished_set(out, settings)
        if rank != 0:  # writes nothing before rank 0 has
            stack.enter_context(_rank_lock(out, rank, reporter))
        encoder = _Encoder(out, plan, _description(plan, tokenizer, (channels, rows, columns)), tokenizer, max_bad, reporter)
        encoder.encode(range(rank, plan.shards, world), workers)
        return encoder.finish(notes) if rank == 0 else None


@contextmanager
def _rank_lock(out: Path, rank: int, reporter: Reporter) -> Iterator[None]:
    """Hold the lock of this rank. Raises UsageError if another process holds it: both would write the same files."""
    with ExitStack() as stack:
        try:
            mine = stack.enter_context(locked(out / ENCODING / f"rank-{rank}.lock"))
        except OSError as error:
            reporter.log(f"{out} cannot be locked, so a second process with rank {rank} would go unnoticed: {error.strerror}")
            mine = True
        if not mine:
            raise UsageError(f"another process is writing {out} as rank {rank}")
        yield


def _description(plan: Plan, tokenizer: Tokenizer, shape: tuple[int, int, int]) -> DatasetInfo:
    settings = plan.settings
    return DatasetInfo(
        tokenizer=settings.tokenizer,
        latent_scale=tokenizer.latent_scale,
        stored=tokenizer.stored,
        shape=shape,
        dtype=settings.dtype,
        classes=plan.classes,
        flipped=settings.flipped,
    )


def finished_set(out: Path, settings: EncodeSettings) -> DatasetInfo | None:
    """Return the set in ``out``, if it is complete. Raises UsageError if it was made with other settings."""
    if not (out / DATASET_FILE).exists():
        return None
    info = LatentShards(out).info
    same = (info.tokenizer, info.dtype, info.flipped) == (settings.tokenizer, settings.dtype, settings.flipped)
    if not same or settings.classes not in (None, info.classes) or not _prepared(settings).items() <= info.images.items():
        create_set_folder(out)  # raises
    _clear(out)
    return info


def _prepared(settings: EncodeSettings) -> dict[str, Any]:
    """Return what a set records about its images, except those left out."""
    names = ("source", "size", "precision", "batch", "samples_per_shard", "image")
    return {"crop": CROP, **{name: getattr(settings, name) for name in names}}


def _plan(out: Path, settings: EncodeSettings, notes: "_ErrorNotes", reporter: Reporter) -> Plan | None:
    """Return the plan. Rank 0 makes it if there is none, and the others wait for it. None if the set is complete by now."""
    path = out / ENCODING / PLAN
    if notes.rank == 0 and not path.exists():
        _make_plan(out, settings, reporter)
    waiting = False
    while True:
        try:
            with _data_error_if_torn(path, f"remove {path.parent} to start over"):
                values = parse_json(path.read_bytes())
                original, images = dict(values["settings"]), [SourceImage(*row) for row in values["images"]]
                plan = Plan(settings, int(values["classes"]), images)
            break
        except FileNotFoundError:
            if finished_set(out, settings) is not None:
                return None
        if not waiting:
            reporter.log(f"waiting for rank 0 to list the images of {settings.source} in {path}")
            waiting = True
        time.sleep(POLL_S)
        notes.check()
    for name, value in asdict(settings).items():
        if (was := original.get(name)) != value:
            raise UsageError(
                f"{out} was started with {name} {was!r}, this command has {name} {value!r}; restore it or write elsewhere"
            )
    return plan


def _make_plan(out: Path, settings: EncodeSettings, reporter: Reporter) -> None:
    create_set_folder(out)
    reporter.log(f"listing the images of {settings.source}")
    images, classes = list_images(Path(settings.source), settings.image, settings.classes)
    order = rng.generator(0, "encode").permutation(len(images))  # in storage order, a shard would hold one class
    plan = {"settings": asdict(settings), "classes": classes, "images": [images[at] for at in order]}
    write_atomically(out / ENCODING / PLAN, json.dumps(plan).encode())
    reporter.log(f"{len(images):,} images of {len({image.label for image in images}):,} classes")


class _Encoder:
    """One process's work on a set: what is done, and what is left."""

    def __init__(
        self, out: Path, plan: Plan, info: DatasetInfo, tokenizer: Tokenizer, max_bad: int, reporter: Reporter
    ) -> None:
        self.out, self.plan, self.info, self.tokenizer = out, plan, info, tokenizer
        self.max_bad, self.reporter = max_bad, reporter
        self.shard, self.bad = ShardBuilder(info), list[_Bad]()  # the shard being built, and its bad images
        self.done = dict[int, str]()  # the records of all processes: shard number -> file name
        self.recorded = dict[str, list[_Bad]]()  # their bad images
        self._scan_records()

    def encode(self, shards: Sequence[int], workers: int) -> None:
        """Encode those of the shards that are not done, or whose files are not as they were written."""
        for damage in self._drop_damaged(shards):
            self.reporter.log(f"{damage}; encoding the shard again")
        self._allow_bad()
        self._report_progress()
        batches = DecodeDataset(self.plan, [shard for shard in shards if shard not in self.done], self.tokenizer.image_channels)
        for batch in decode_batches(batches, workers):
            for source, why in batch.bad:
                self._skip(source, why)
            if batch.sources:
                self._add(batch.sources, batch.images.numpy())
            if batch.last:
                self._end_shard(batch.shard)
            if time.monotonic() - self.scanned_at > max(SCAN_S, self.min_interval):
                self._scan_records()
            self._report_progress()

    def finish(self, notes: "_ErrorNotes") -> DatasetInfo:
        """Wait for the shards of all processes, then complete the set and return its description."""
        for scan in itertools.count():
            self._scan_records()
            self._allow_bad()
            self._report_progress()
            missing = [shard for shard in range(self.plan.shards) if shard not in self.done]
            if not missing:
                break
            if scan == 0:
                first = shard_name(PREFIX, missing[0])
                self.reporter.log(f"waiting for {len(missing)} shards of other ranks, the first {first}")
            time.sleep(max(POLL_S, self.min_interval))
            notes.check()
        if damaged := self._drop_damaged(range(self.plan.shards)):
            raise DataError(f"{damaged[0]} ({len(damaged)} such shards); run the same command again to encode them")
        records = [self._record(self.done[shard]) for shard in range(self.plan.shards)]
        bad = [image for record in records for image in record.bad]
        shards = [record.shard for record in records if record.shard is not None]
        if not shards:
            raise DataError(f"all {len(bad)} images are bad, the first {self._named(bad[0])}")
        info = replace(self.info, images={**_prepared(self.plan.settings), "skipped": [image.name for image in bad]})
        write_dataset_file(self.out, info, shards)
        _clear(self.out)
        return replace(info, shards=tuple(shards))

    def _add(self, sources: list[SourceImage], images: np.ndarray) -> None:
        """Encode images into the shard being built."""
        views = (images, images[..., ::-1]) if self.info.flipped else (images,)
        try:
            arrays = [self.tokenizer.encode(view, self.info.dtype, strict=False) for view in views]
        except torch.OutOfMemoryError:
            batch = self.plan.settings.batch
            raise ConfigError(f"batch {batch}: not enough device memory for that many images per forward pass") from None
        finite = np.logical_and.reduce([np.isfinite(array).all(axis=(1, 2, 3)) for array in arrays])
        for source, storable, *rows in zip(sources, finite, *arrays, strict=True):
            if storable:
                self.shard.add(source.key, source.label, *rows)
            else:
                self._skip(source, f"its {self.info.stored} are not finite in {self.info.dtype}")

    def _skip(self, source: SourceImage, why: str) -> None:
        self.bad.append(_Bad(source.name, why))
        self._scan_records()
        self._allow_bad()
        self.reporter.log(f"skipped {self._named(self.bad[-1])}")

    def _end_shard(self, number: int) -> None:
        """Write the tar, its index, then the record: a shard with a record is complete and is not encoded again."""
        name = shard_name(PREFIX, number)
        shard = asdict(self.shard.write(self.out, name)) if len(self.shard) else None
        sync_folder(self.out)  # else a crash of the machine could keep the record and lose the tar
        record = f"{name}{BAD_RECORD if self.bad else RECORD}"
        write_atomically(self.out / ENCODING / record, json.dumps({"shard": shard, "bad": self.bad}).encode())
        self.done[number] = record
        lacks, self.shard, self.bad = self.bad, ShardBuilder(self.info), []
        if lacks:
            self._scan_records()
            self._allow_bad()  # again: another process may have written its record at the same moment

    def _scan_records(self) -> None:
        """Read the records of all processes."""
        start = time.monotonic()
        with suppress(FileNotFoundError):  # the set was completed at this moment
            names = os.listdir(self.out / ENCODING)
            self.done = {_number(name): name for name in names if name.startswith(PREFIX) and name.endswith(RECORD)}
            with_bad = [name for name in self.done.values() if name.endswith(BAD_RECORD)]
            self.recorded = {name: self.recorded.get(name) or self._record(name).bad for name in with_bad}
        self.scanned_at = time.monotonic()
        self.min_interval = SCAN_REST * (self.scanned_at - start)

    def _record(self, name: str) -> "_Record":
        path = self.out / ENCODING / name
        with _data_error_if_torn(path, "remove it to encode its shard again"):
            record = parse_json(path.read_bytes())
            shard = None if record["shard"] is None else ShardInfo(**record["shard"])
            return _Record(shard, [_Bad(*image) for image in record["bad"]])

    def _drop_damaged(self, shards: Sequence[int]) -> list[str]:
        """Remove the records of shards whose files are not as recorded. Return what is wrong with each.

        Only the size of a tar is checked: ``verify_shards`` reads them.
        """
        damaged, folder = list[str](), LocalFolder(self.out)
        for number in shards:
            if number in self.done and (shard := self._record(self.done[number]).shard) is not None:
                try:
                    folder.check_size(f"{shard.name}.tar", shard.bytes)
                    if zlib.crc32(folder.read(f"{shard.name}{INDEX}")) != shard.index_crc32:
                        raise DataError(f"{folder.path(f'{shard.name}{INDEX}')} is torn or changed")
                except DataError as error:
                    damaged.append(str(error))
                    name = self.done.pop(number)
                    (self.out / ENCODING / name).unlink(missing_ok=True)
                    self.recorded.pop(name, None)
        return damaged

    def _all_bad(self) -> list["_Bad"]:
        return [*(image for name in sorted(self.recorded) for image in self.recorded[name]), *self.bad]

    def _allow_bad(self) -> None:
        if len(bad := self._all_bad()) > self.max_bad:
            raise DataError(f"{len(bad)} bad images, --max-bad allows {self.max_bad}: {self._named(bad[-1])}")

    def _named(self, image: "_Bad") -> str:
        return f"{Path(self.plan.settings.source) / image.name}: {image.why}"

    def _report_progress(self) -> None:
        done = self.plan.samples_in(self.done) + len(self.shard) + len(self.bad)
        self.reporter.progress(done, len(self.plan.images), len(self._all_bad()))


class _ErrorNotes:
    """A process that fails leaves a note, so that processes that wait for it do not wait forever.

    Notes found at startup are from an earlier start: the processes that left them may have been restarted too.
    """

    def __init__(self, out: Path, rank: int, world: int) -> None:
        self.folder, self.rank = out / ENCODING, rank
        awaited = range(1, world) if rank == 0 else [0]  # for their shards; for the plan
        self.awaited = [self.folder / f"{NOTE}{other}" for other in awaited]
        self.old = self._found()

    def _found(self) -> dict[Path, int]:
        """Return the notes of the ranks that this one waits for, with their modification times."""
        found = dict[Path, int]()
        for path in self.awaited:
            with suppress(FileNotFoundError):
                found[path] = path.stat().st_mtime_ns
        return found

    def check(self) -> None:
        """Raise the error of an awaited rank that has failed since this one started, with its exit code."""
        for path in sorted(path for path, when in self._found().items() if self.old.get(path) != when):
            rank = path.name.removeprefix(NOTE)
            with _data_error_if_torn(path, f"rank {rank} failed, reason unknown"):
                reason, code = parse_json(path.read_bytes())
            error = XarScaleError(f"rank {rank} failed: {reason}")
            error.exit_code = code
            raise error

    @contextmanager
    def write_on_error(self) -> Iterator[None]:
        try:
            yield
        except UsageError:
            raise  # it concerns this command line, and those of the others may differ
        except Exception as caught:
            error = dist.known_error(caught) or caught
            note = [str(error) or type(error).__name__, getattr(error, "exit_code", XarScaleError.exit_code)]
            with suppress(OSError):  # there is no folder yet, or the error persists
                write_atomically(self.folder / f"{NOTE}{self.rank}", json.dumps(note).encode())
            raise


class _Bad(NamedTuple):
    """A bad image, which is left out."""

    name: str
    why: str


class _Record(NamedTuple):
    """The record of a finished shard."""

    shard: ShardInfo | None  # None if all its images are bad
    bad: list[_Bad]


@contextmanager
def _data_error_if_torn(path: Path, remedy: str) -> Iterator[None]:
    """Wrap the parsing of a JSON file: raise DataError, with the ``remedy``, if the content is not what was written."""
    try:
        yield
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is torn; {remedy}") from None


def _number(record: str) -> int:
    return int(record.split(".")[0].removeprefix(f"{PREFIX}-"))


def _clear(out: Path) -> None:
    shutil.rmtree(out / ENCODING, ignore_errors=True)  # another rank may be reading it: leftovers do no harm
