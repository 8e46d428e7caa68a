"""Writes the checkpoints of a run while it goes on: whole or not at all, and no older one goes before a newer one is there.

Each rank copies what it owns to the host's memory, which is all that training waits for; a thread writes it. What the ranks'
threads have come to, all ranks learn together between two steps (``poll``), and go on to the next stage or try again together.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from xar_scale import dist
from xar_scale.background import Background, Stage
from xar_scale.checkpoint.files import Fingerprint, Range, file_name, write_file
from xar_scale.checkpoint.load import state_vectors
from xar_scale.checkpoint.manifest import (
    AVERAGES,
    FOLDER,
    LATEST,
    MANIFEST,
    Manifest,
    checkpoint_name,
    checkpoint_paths,
    step_of,
)
from xar_scale.checkpoint.mirror import Mirror
from xar_scale.config import TrainConfig
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.errors import FileError
from xar_scale.files import free_name, make_folder, remove, sync_folder, write_atomically
from xar_scale.staging import Staging

ATTEMPTS_AT_THE_END = 6  # of writing the last checkpoint, 1, 2, 4, ... seconds apart


class Store:
    """The checkpoints of one run, in ``RUN/checkpoints``, and snapshots of averages, in ``RUN/ema``, of which none is dropped.

    Every rank makes the same calls, in the same order.

    A failure to write is reported, and tried again, by training while it goes on and at its end a few times more; one that
    lasts until the next checkpoint is due gives way to that.
    """

    def __init__(self, run: Path, engine: Engine, ema: EMA, settings: TrainConfig, mirror: Mirror | None = None) -> None:
        """``mirror``: what each checkpoint is copied to, once it is written.

        All the host's memory that saving takes is taken here.
        """
        self.run, self.folder = run, run / FOLDER
        self.engine, self.ema, self.settings, self.mirror = engine, ema, settings, mirror
        self.newest: Path | None = None  # written by this run
        self.stalled = 0.0  # seconds that training has waited, since whoever counts them set this to 0
        self._staging = Staging([tensor for _, _, tensor in _own_vectors(engine, ema)])
        self._writing: Background | None = None
        self._begun: Path | None = None  # what that is about
        self._uploading: Background | None = None
        self._uploaded: Path | None = None  # what that is about
        self._to_upload: Path | None = None  # after that: the newest one that is written
        self._copied = set[int]()  # steps, of this run's start and since

    def open(self, start: int) -> None:
        """Rank 0's part of beginning at step ``start``: make the folder, and put in order what an earlier run left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._copied.add(start)
        if len(self.ema.averages) > 1:  # snapshots are due, and come before the checkpoints of their steps
            make_folder(self.run / AVERAGES)
        self._set_in_order(start)
        with contextlib.suppress(OSError):
            self._drop_older()  # the run goes on from the newest, which is valid; the next save may need the room
        for folder in (FOLDER, AVERAGES):
            for leftover in (self.run / folder).glob(".step-*"):
                remove(leftover)

    def set_aside_after(self, step: int) -> None:
        """Rename what is of later steps, so that it neither counts nor blocks: checkpoints, damaged ones that resuming passed
        over, and snapshots, which will be taken again."""
        for folder, prefix in ((FOLDER, "damaged"), (AVERAGES, "superseded")):
            for path in checkpoint_paths(self.run, folder):
                if step_of(path) > step:
                    aside = free_name(path.with_name(f"{prefix}-{path.name}"))
                    path.rename(aside)
                    print(f"{path} is now {aside.name}", flush=True)

    def save(self, *manifests: Manifest) -> None:
        """Begin to write the state as it is now, of which each manifest describes some kinds of vectors, but for its files:
        a snapshot of averages, a checkpoint, or one after the other."""
        self.lacks_checkpoint()
        if self._writing is not None:
            dist.say(f"{self._writing.name}: given up for the next one")
        begun = time.perf_counter()
        vectors = _own_vectors(self.engine, self.ema)
        self._staging.take([tensor for _, _, tensor in vectors])
        parts = [Range(key, start, copy) for (key, start, _), copy in zip(vectors, self._staging.copies, strict=True)]
        stages = [stage for manifest in manifests for stage in self._stages(manifest, parts)]
        self._begun = self._final(manifests[-1])
        name = " and ".join(f"{_kind(manifest)} {self._final(manifest)}" for manifest in manifests)
        self._writing = Background(name, stages, self.engine.device)
        self.stalled += time.perf_counter() - begun

    def _stages(self, manifest: Manifest, parts: Sequence[Range]) -> list[Stage]:
        parts = [part for part in parts if part.key.split("/")[0] in manifest.kinds]
        return [lambda _: self._write(manifest, parts), lambda files: self._publish(manifest, files)]

    def lacks_checkpoint(self) -> bool:
        """Whether there is one that could not be written, after waiting for what is being."""
        begun = time.perf_counter()
        written = self._writing is None or self._written(attempts=1)
        self.stalled += time.perf_counter() - begun
        return not written and self._begun is not None and self._begun.parent == self.folder

    def poll(self) -> None:
        """Between steps: let what is under way go on. Costs nothing when nothing is."""
        if self._writing is not None:
            self._writing.poll()
            if self._writing.done:
                self._written()
        if self._uploading is not None:
            self._uploading.poll()
            if self._uploading.done:
                self._uploaded = None
        self._upload_next()

    def finish(self, *, stopped: bool = False) -> None:
        """Wait until what is under way is done. Raises FileError when that cannot be.

        A copy that cannot be made is only said where the run is ``stopped`` before its end: it goes on from its own checkpoint.
        """
        failed: list[Background] = []
        if (work := self._writing) is not None and not self._written(ATTEMPTS_AT_THE_END):
            failed.append(work)
        while True:  # what is under way, and the newest one
            self._upload_next()
            last = self._to_upload is None  # else what is under way gives way to it
            if (work := self._uploading) is None or work.settle(ATTEMPTS_AT_THE_END if last else 1):
                self._uploading = self._uploaded = None
            elif last:
                failed.append(work)
            if last:
                break
        for work in failed:
            given_up = f"{work.name}: given up after {work.attempts} attempts: {work.error}"
            if not (stopped and work is self._uploading):
                raise FileError(given_up)
            dist.say(given_up)

    def go_back(self, step: int) -> None:
        """The run goes on from ``step``: what is of later steps is not written or copied any more, and does not count."""
        if self._begun is not None and step_of(self._begun) > step:
            self._writing = None  # it was waited for, and failed
        if self._to_upload is not None and step_of(self._to_upload) > step:
            self._to_upload = None
        dist.on_rank_0(lambda: self._set_in_order(step))

    def _set_in_order(self, step: int) -> None:
        self.set_aside_after(step)
        paths = checkpoint_paths(self.run)
        with contextlib.suppress(OSError):  # a pointer for people and tools: a full disk is no reason to stop
            if paths:
                self._point_at(paths[-1])
            else:
                (self.folder / LATEST).unlink(missing_ok=True)

    def newest_on_disk(self) -> Path | None:
        """Of this run or one before it, as rank 0 sees it, after waiting for what is being written."""
        if self._writing is not None:
            self._written(attempts=1)
        paths = dist.on_rank_0(lambda: checkpoint_paths(self.run))
        return paths[-1] if paths else None

    def _written(self, attempts: int = 1) -> bool:
        """Wait for what is being written; whether it is."""
        assert self._writing is not None
        if not self._writing.settle(attempts):
            return False
        self._writing = None
        if self._begun is not None and self._begun.parent == self.folder:
            self.newest = self._begun
            self._to_upload = self._begun if self.mirror is not None else None
        return True

    def _upload_next(self) -> None:
        """Begin to, unless another is under way; one that fails gives way."""
        if self._to_upload is None or self.mirror is None:
            return
        if self._uploading is not None and not self._uploading.done:
            if not self._uploading.failing:
                return
            dist.say(f"{self._uploading.name}: given up for the next one")
        mirror, path = self.mirror, self._to_upload
        self._uploaded, self._to_upload = path, None  # in this order: what either names is not dropped
        stages: list[Stage] = [
            lambda _: mirror.remove(step_of(path)) if dist.rank() == 0 else None,  # what an earlier attempt left
            lambda _: mirror.upload(path, [file_name(dist.rank())]),
            lambda _: self._complete_upload(mirror, path),
        ]
        self._uploading = Background(f"copy of checkpoint {path} to {mirror.url}", stages, self.engine.device)

    def _write(self, manifest: Manifest, parts: Sequence[Range]) -> dict[str, Fingerprint]:
        """This rank's file."""
        self._staging.wait()
        temporary = self._temporary(manifest)
        if dist.rank() == 0:
            for given_up in temporary.parent.glob(".step-*.tmp"):
                if given_up != temporary:
                    with contextlib.suppress(OSError):
                        remove(given_up)
        temporary.mkdir(parents=True, exist_ok=True)
        path = temporary / file_name(dist.rank())
        try:
            return {path.name: write_file(path, parts)}
        except OSError:
            path.unlink(missing_ok=True)  # the room that it takes may be what others lack
            raise

    def _publish(self, manifest: Manifest, written: Sequence[dict[str, Fingerprint]]) -> None:
        """Rank 0: one rename makes it visible; only then does anything older go."""
        temporary, final = self._temporary(manifest), self._final(manifest)
        if dist.rank() != 0:
            return
        files = {name: entry for of_rank in written for name, entry in of_rank.items()}
        if temporary.exists() or not final.exists():  # else it was renamed before something failed
            for name, entry in files.items():
                if not (temporary / name).is_file() or (temporary / name).stat().st_size != entry.bytes:
                    raise OSError(f"rank 0 sees {temporary / name} not as it was written: the folder must be one for all ranks")
            write_atomically(temporary / MANIFEST, replace(manifest, files=files).to_json())
            sync_folder(temporary)
            temporary.rename(final)
            sync_folder(final.parent)
        if final.parent == self.folder:
            self._point_at(final)
            self._drop_older()

    def _point_at(self, path: Path) -> None:
        write_atomically(self.folder / LATEST, f"{path.name}\n".encode())

    def _drop_older(self) -> None:
        """Hidden first: one that is half deleted is not a checkpoint."""
        for step in self._too_old([step_of(path) for path in checkpoint_paths(self.run)]):
            path = self.folder / checkpoint_name(step)
            if path not in (self._to_upload, self._uploaded):
                path.rename(path.with_name(f".{path.name}.old"))
        for hidden in self.folder.glob(".step-*.old"):
            with contextlib.suppress(OSError):
                remove(hidden)

    def _too_old(self, steps: Sequence[int]) -> list[int]:
        """Of the steps of checkpoints, oldest first, those that need not be kept."""
        every = self.settings.keep_every
        return [step for step in steps[: -self.settings.keep_last] if not every or step % every]

    def _complete_upload(self, mirror: Mirror, final: Path) -> None:
        """Rank 0: the manifest makes it complete; only then does anything older go."""
        if dist.rank() == 0:
            mirror.upload(final, [MANIFEST])
            self._copied.add(step_of(final))
            there = mirror.listing()
            complete = [step for step in there if there[step]]
            given_up = {*there} - {*complete, step_of(final)}
            later = [step for step in complete if step > step_of(final)]
            # its own are of a course that it has gone back from; others, not seen at the start for a silent store, of this one
            stale = self._copied.intersection(later)
            for step in sorted({*given_up, *stale, *self._too_old(complete[: len(complete) - len(later)])}):
                mirror.remove(step)

    def _temporary(self, manifest: Manifest) -> Path:
        final = self._final(manifest)
        return final.with_name(f".{final.name}.tmp")

    def _final(self, manifest: Manifest) -> Path:
        return self.run / (FOLDER if _kind(manifest) == "checkpoint" else AVERAGES) / checkpoint_name(manifest.step)


def _kind(manifest: Manifest) -> str:
    return "checkpoint" if "model" in manifest.kinds else "snapshot"


def _own_vectors(engine: Engine, ema: EMA) -> list[tuple[str, int, torch.Tensor]]:
    """What this rank writes of what it owns. Where several ranks own the same, each writes an equal part of it."""
    copies = engine.replicas
    copy = dist.rank() // (dist.world() // copies)
    parts = []
    for key, start, tensor in state_vectors(engine, ema):
        begin, end = (tensor.numel() * at // copies for at in (copy, copy + 1))
        parts.append((key, start + begin, tensor[begin:end]))
    return parts
