"""Write the checkpoints of a run while it trains. Each is published atomically, and only then is an older one removed.

Each rank copies what it owns to host memory, which is all that training waits for; a thread writes the copy. Between two steps
(``poll``) all ranks learn how the threads fared, and together start the next stage or retry.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xar_scale import dist
from xar_scale.background import Background, Stage
from xar_scale.checkpoint.files import Fingerprint, Range, file_name, write_file
from xar_scale.checkpoint.load import parts_of, state_vectors
from xar_scale.checkpoint.manifest import (
    EMA_SNAPSHOTS,
    FOLDER,
    LATEST,
    MANIFEST,
    Manifest,
    checkpoint_name,
    checkpoint_paths,
    read_manifest,
    step_of,
)
from xar_scale.checkpoint.mirror import Mirror
from xar_scale.config import TrainConfig
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.errors import DataError, FileError, UsageError
from xar_scale.files import free_name, make_folder, publish, remove, write_atomically
from xar_scale.staging import Staging

FINAL_ATTEMPTS = 6  # to write the last checkpoint, 1, 2, 4, ... seconds apart
STOP_UPLOAD_S = 60.0  # for copies once a stopped run has written its checkpoint: SLURM kills it five minutes after the signal


class Store:
    """The checkpoints of one run, in ``RUN/checkpoints``, and its EMA snapshots, in ``RUN/ema``, which are never removed.

    Every rank makes the same calls, in the same order.

    A failed write is reported and retried, during training (``poll``) and a few more times at its end (``finish``). If it still
    fails when the next checkpoint is due, that one is written instead.
    """

    def __init__(self, run: Path, engine: Engine, ema: EMA, settings: TrainConfig, mirror: Mirror | None = None) -> None:
        """``mirror``: where each checkpoint is copied once it is written.

        All host memory that saving needs is allocated here.
        """
        self.run, self.folder = run, run / FOLDER
        self.engine, self.ema, self.settings, self.mirror = engine, ema, settings, mirror
        self.newest: Path | None = None  # written by this run
        self.stall_s = 0.0  # seconds that training has waited; the caller resets it
        self._staging = Staging([tensor for _, _, tensor in parts_of(state_vectors(engine, ema), engine)])
        self._writing: Background | None = None
        self._writing_path: Path | None = None  # what ``_writing`` writes (last)
        self._uploading: Background | None = None
        self._uploading_path: Path | None = None  # what ``_uploading`` copies
        self._to_upload: Path | None = None  # next: the newest one written
        self._inherited: Path | None = None  # the checkpoint that the run resumed from, as long as it is the newest
        self._copied = set[int]()  # steps copied by this run, and that of its start

    def inherit(self, path: Path) -> None:
        """The run resumes from the checkpoint ``path``: copy it if there is no copy, as the last start may have been stopped
        before it was made."""
        if self.mirror is not None and path.parent == self.folder:
            self._inherited = self._to_upload = path

    def open(self, start: int) -> None:
        """Rank 0's part of starting at step ``start``: make the folder and tidy up what an earlier run left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._copied.add(start)
        if len(self.ema.averages) > 1:  # snapshots will be due, before the checkpoints of their steps
            make_folder(self.run / EMA_SNAPSHOTS)
        self._tidy(start)
        with contextlib.suppress(OSError):
            self._drop_older()  # the run resumes from the newest, which is valid; the next save may need the space
        for folder in (FOLDER, EMA_SNAPSHOTS):
            for leftover in (self.run / folder).glob(".step-*"):
                remove(leftover)

    def set_aside_after(self, step: int) -> None:
        """Rename what is from later steps, so that it neither counts nor blocks: checkpoints, damaged ones that resuming passed
        over, and snapshots, which will be written again."""
        for folder, prefix in ((FOLDER, "damaged"), (EMA_SNAPSHOTS, "superseded")):
            for path in checkpoint_paths(self.run, folder):
                if step_of(path) > step:
                    aside = free_name(path.with_name(f"{prefix}-{path.name}"))
                    path.rename(aside)
                    print(f"{path} renamed to {aside.name}", flush=True)

    def save(self, *manifests: Manifest) -> None:
        """Start to write the current state. Each manifest describes some kinds of its vectors, but not yet the files: an EMA
        snapshot, a checkpoint, or a snapshot and then a checkpoint."""
        self.checkpoint_failed()
        if self._writing is not None:
            dist.say(f"{self._writing.name}: given up for the next one")
        begun = time.perf_counter()
        vectors = parts_of(state_vectors(self.engine, self.ema), self.engine)
        self._staging.take([tensor for _, _, tensor in vectors])
        parts = [Range(key, start, copy) for (key, start, _), copy in zip(vectors, self._staging.copies, strict=True)]
        stages = [stage for manifest in manifests for stage in self._stages(manifest, parts)]
        self._writing_path = self._final(manifests[-1])
        name = " and ".join(f"{_kind(manifest)} {self._final(manifest)}" for manifest in manifests)
        self._writing = Background(name, stages, self.engine.device)
        self.stall_s += time.perf_counter() - begun

    def _stages(self, manifest: Manifest, parts: Sequence[Range]) -> list[Stage]:
        parts = [part for part in parts if part.key.split("/")[0] in manifest.kinds]
        return [lambda _: self._write(manifest, parts), lambda files: self._publish(manifest, files)]

    def checkpoint_failed(self) -> bool:
        """Wait for the save under way. Return whether it has a checkpoint that could not be written."""
        begun = time.perf_counter()
        written = self._writing is None or self._wait_for_write(attempts=1)
        self.stall_s += time.perf_counter() - begun
        return not written and self._writing_path is not None and self._writing_path.parent == self.folder

    def poll(self) -> None:
        """Between steps: advance what is under way. Costs nothing if nothing is."""
        if self._writing is not None:
            self._writing.poll()
            if self._writing.done:
                self._wait_for_write()
        if self._uploading is not None:
            self._uploading.poll()
            if self._uploading.done:
                self._uploading_path = None
        self._upload_next()

    def finish(self, *, stopped: bool = False, upload_attempts: int = FINAL_ATTEMPTS) -> None:
        """Wait until what is under way is done. Raises FileError if it fails.

        If the run is ``stopped`` before its end, a copy that fails, or is not done after STOP_UPLOAD_S seconds, is only
        reported: the run can resume from its own checkpoint, and copies it then.
        """
        failed: list[Background] = []
        if (work := self._writing) is not None and not self._wait_for_write(FINAL_ATTEMPTS):
            failed.append(work)
        until = time.monotonic() + STOP_UPLOAD_S if stopped else None
        while True:  # the copy under way, then that of the newest checkpoint
            self._upload_next()
            last = self._to_upload is None  # else, if the copy under way fails, the newest one is next
            if (work := self._uploading) is None or work.settle(upload_attempts if last else 1, until):
                self._uploading = self._uploading_path = None
            elif last or not work.failing:  # the last one, or out of time
                failed.append(work)
                break
            if last:
                break
        for work in failed:
            why = f"given up after {work.attempts} attempts: {work.error}" if work.failing else "given up: the run exits"
            given_up = f"{work.name}: {why}"
            if not (stopped and work is self._uploading):
                raise FileError(given_up)
            dist.say(given_up)

    def roll_back(self, step: int) -> None:
        """The run continues from ``step``: nothing from later steps is written or copied any more, or counts."""
        if self._writing_path is not None and step_of(self._writing_path) > step:
            self._writing = None  # it has been waited for, and failed
        if self._to_upload is not None and step_of(self._to_upload) > step:
            self._to_upload = None
        dist.on_rank_0(lambda: self._tidy(step))

    def _tidy(self, step: int) -> None:
        self.set_aside_after(step)
        paths = checkpoint_paths(self.run)
        with contextlib.suppress(OSError):  # only people and tools read it: a full disk is no reason to stop
            if paths:
                self._point_at(paths[-1])
            else:
                (self.folder / LATEST).unlink(missing_ok=True)

    def newest_on_disk(self) -> Path | None:
        """Wait for the save under way. Return the newest checkpoint in the folder, of this run or before, as rank 0 sees it."""
        if self._writing is not None:
            self._wait_for_write(attempts=1)
        paths = dist.on_rank_0(lambda: checkpoint_paths(self.run))
        return paths[-1] if paths else None

    def _wait_for_write(self, attempts: int = 1) -> bool:
        """Wait for the save under way. Return whether it succeeded."""
        assert self._writing is not None
        if not self._writing.settle(attempts):
            return False
        self._writing = None
        if self._writing_path is not None and self._writing_path.parent == self.folder:
            self.newest, self._inherited = self._writing_path, None
            self._to_upload = self._writing_path if self.mirror is not None else None
        return True

    def _upload_next(self) -> None:
        """Start to copy the newest checkpoint, unless a copy is under way. A copy that is failing is given up for it."""
        if self._to_upload is None or self.mirror is None:
            return
        if self._uploading is not None and not self._uploading.done:
            if not self._uploading.failing:
                return
            dist.say(f"{self._uploading.name}: given up for the next one")
        mirror, path = self.mirror, self._to_upload
        self._uploading_path, self._to_upload = path, None  # in this order: a path in either is not dropped
        inherited = path == self._inherited
        stages: list[Stage] = [
            lambda _: _prepare_upload(mirror, path, unless_there=inherited) if dist.rank() == 0 else None,
            lambda files: _upload(mirror, path, files[0]),
            lambda uploaded: self._complete_upload(mirror, path) if uploaded[0] else None,
        ]
        self._uploading = Background(f"copy of checkpoint {path} to {mirror.url}", stages, self.engine.device)

    def _write(self, manifest: Manifest, parts: Sequence[Range]) -> dict[str, Fingerprint]:
        """Write this rank's file."""
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
            path.unlink(missing_ok=True)  # others may need the space
            raise

    def _publish(self, manifest: Manifest, written: Sequence[dict[str, Fingerprint]]) -> None:
        """On rank 0: one rename publishes it; only then is anything older removed."""
        temporary, final = self._temporary(manifest), self._final(manifest)
        if dist.rank() != 0:
            return
        files = {name: entry for of_rank in written for name, entry in of_rank.items()}
        if temporary.exists() or not final.exists():  # else it was renamed before a later step failed
            for name, entry in files.items():
                if not (temporary / name).is_file() or (temporary / name).stat().st_size != entry.bytes:
                    raise OSError(f"rank 0 does not see {temporary / name} as it was written: all ranks must share the folder")
            write_atomically(temporary / MANIFEST, replace(manifest, files=files).to_json())
            publish(temporary, final)
        if final.parent == self.folder:
            self._point_at(final)
            self._drop_older()

    def _point_at(self, path: Path) -> None:
        write_atomically(self.folder / LATEST, f"{path.name}\n".encode())

    def _drop_older(self) -> None:
        """Rename to a hidden name first: a half-deleted folder must not count as a checkpoint."""
        for step in self._too_old([step_of(path) for path in checkpoint_paths(self.run)]):
            path = self.folder / checkpoint_name(step)
            if path not in (self._to_upload, self._uploading_path):
                path.rename(path.with_name(f".{path.name}.old"))
        for hidden in self.folder.glob(".step-*.old"):
            with contextlib.suppress(OSError):
                remove(hidden)

    def _too_old(self, steps: Sequence[int]) -> list[int]:
        """Of the steps of checkpoints, oldest first, return those that need not be kept."""
        every = self.settings.keep_every
        return [step for step in steps[: -self.settings.keep_last] if not every or step % every]

    def _complete_upload(self, mirror: Mirror, final: Path) -> None:
        """On rank 0: the manifest makes the copy complete; only then is anything older removed."""
        if dist.rank() != 0:
            return
        mirror.upload(final, [MANIFEST])
        self._copied.add(step_of(final))
        there = mirror.listing()
        complete = [step for step in there if there[step]]
        given_up = {*there} - {*complete, step_of(final)}
        later = [step for step in complete if step > step_of(final)]
        # later copies of its own are from before a rollback; others were unseen at the start (unreachable store) and stay
        stale = self._copied.intersection(later)
        for step in sorted({*given_up, *stale, *self._too_old(complete[: len(complete) - len(later)])}):
            mirror.remove(step)

    def _temporary(self, manifest: Manifest) -> Path:
        final = self._final(manifest)
        return final.with_name(f".{final.name}.tmp")

    def _final(self, manifest: Manifest) -> Path:
        return self.run / (FOLDER if _kind(manifest) == "checkpoint" else EMA_SNAPSHOTS) / checkpoint_name(manifest.step)


def _prepare_upload(mirror: Mirror, path: Path, *, unless_there: bool) -> list[str]:
    """On rank 0: return the files to copy, none if the copy is ``unless_there``. What else is in its place is removed: of an
    earlier attempt, or from before a rollback."""
    step = step_of(path)
    try:
        manifest = read_manifest(path).manifest
    except (UsageError, DataError) as error:  # somebody removed it: no reason to stop
        raise FileError(str(error)) from None
    if unless_there and step in mirror.steps():
        with contextlib.suppress(DataError):
            if mirror.manifest(step) == manifest:
                return []
    mirror.remove(step)
    return sorted(manifest.files)


def _upload(mirror: Mirror, path: Path, files: Sequence[str]) -> bool:
    """Copy this rank's share of ``files``. Return whether there are any."""
    if files:
        mirror.upload(path, dist.mine(files))
    return bool(files)


def _kind(manifest: Manifest) -> str:
    return "checkpoint" if "model" in manifest.kinds else "snapshot"
