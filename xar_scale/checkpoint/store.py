"""Writes the checkpoints of a run while it goes on: whole or not at all, and no older one goes before a newer one is there.

Each rank copies what it owns to the host's memory, which is all that training waits for; a thread writes it. What the ranks'
threads have come to, all ranks learn together between two steps (``poll``), and go on to the next stage or try again together.
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xar_scale import dist
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
from xar_scale.config import TrainConfig
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.errors import FileError
from xar_scale.files import free_name, sync_folder, write_atomically
from xar_scale.staging import Staging

ATTEMPTS_AT_THE_END = 6  # of writing the last checkpoint, 1, 2, 4, ... seconds apart


_Stage = tuple[Manifest, Callable[[Sequence[Any]], Any]]  # from all ranks' results of the stage before to this rank's


@dataclass
class _Save:
    """A state on its way to the disk, to one folder after another, through the stages that are left."""

    begun: float
    stages: list[_Stage]
    results: Sequence[Any] = ()
    running: Future[Any] | None = None
    attempts: int = 0  # of this stage, that failed
    wait: int = 0  # polls until the next one
    error: str = ""

    @property
    def manifest(self) -> Manifest:
        """Of the folder that is being written."""
        return self.stages[0][0]


class Store:
    """The checkpoints of one run, in ``RUN/checkpoints``, and snapshots of averages, in ``RUN/ema``, of which none is dropped.

    Every rank makes the same calls, in the same order.

    A failure to write is reported, and tried again, by training while it goes on and at its end a few times more; one that
    lasts until the next checkpoint is due gives way to that.
    """

    def __init__(self, run: Path, engine: Engine, ema: EMA, settings: TrainConfig) -> None:
        self.run, self.folder = run, run / FOLDER
        self.engine, self.ema, self.settings = engine, ema, settings
        self.newest: Path | None = None  # written by this run
        self.stalled = 0.0  # seconds that training has waited, since whoever counts them set this to 0
        self._staging: Staging | None = None
        self._save: _Save | None = None

    def open(self, start: int) -> None:
        """Rank 0's part of beginning at step ``start``: make the folder, and put in order what an earlier run left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.set_aside_after(start)
        for folder in (FOLDER, AVERAGES):
            for leftover in (self.run / folder).glob(".step-*"):
                shutil.rmtree(leftover)
        if paths := checkpoint_paths(self.run):
            self._point_at(paths[-1])

    def set_aside_after(self, step: int) -> None:
        """Rename what is of later steps, so that it neither counts nor blocks: checkpoints, damaged ones that resuming passed
        over, and snapshots, which will be taken again."""
        for folder, prefix in ((FOLDER, "damaged"), (AVERAGES, "superseded")):
            for path in checkpoint_paths(self.run, folder):
                if step_of(path) > step:
                    path.rename(free_name(path.with_name(f"{prefix}-{path.name}")))

    def save(self, *manifests: Manifest) -> None:
        """Begin to write the state as it is now, of which each manifest describes some kinds of vectors, but for its files:
        a checkpoint, a snapshot of averages, or one after the other."""
        begun = time.perf_counter()
        if self._save is not None and not self._settle(attempts=1):
            dist.say(f"{self._name(self._save)} given up for the next one: {self._save.error}")
            self._save = None
        vectors = _own_vectors(self.engine, self.ema)
        tensors = [tensor for _, _, tensor in vectors]
        self._staging = self._staging or Staging(tensors)
        self._staging.take(tensors)
        parts = [(key, start, copy) for (key, start, _), copy in zip(vectors, self._staging.copies, strict=True)]
        self._save = _Save(begun, [stage for manifest in manifests for stage in self._stages(manifest, parts)])
        self._start(self._save)
        self.stalled += time.perf_counter() - begun

    def poll(self) -> None:
        """Between steps: where every rank's thread is done, go on together. Costs nothing when nothing is on its way."""
        save = self._save
        if save is None:
            return
        if save.running is None:
            save.wait -= 1
            if save.wait <= 0:
                self._start(save)
        elif not dist.all_reduce_sum(torch.tensor(int(not save.running.done()), device=self.engine.device)):
            self._conclude(save)

    def finish(self) -> None:
        """Wait until what is on its way is on the disk. Raises FileError when that cannot be."""
        begun = time.perf_counter()
        if self._save is not None and not self._settle(ATTEMPTS_AT_THE_END):
            save, self._save = self._save, None
            raise FileError(f"{self._name(save)} could not be written, in {save.attempts} attempts: {save.error}")
        self.stalled += time.perf_counter() - begun

    def newest_on_disk(self) -> Path | None:
        """Of this run or one before it, as rank 0 sees it, after waiting for what is on its way."""
        self._settle(attempts=1)
        paths = dist.on_rank_0(lambda: checkpoint_paths(self.run))
        return paths[-1] if paths else None

    def _settle(self, attempts: int) -> bool:
        """Wait for what is on its way; False where it fails for the ``attempts``-th time."""
        while (save := self._save) is not None:
            if save.running is None:
                if save.attempts >= attempts:
                    return False
                time.sleep(2.0 ** (save.attempts - 1))
                self._start(save)
            self._conclude(save)
        return True

    def _start(self, save: _Save) -> None:
        """This rank's part of the stage, in a thread that does not keep the process from ending."""
        running = Future[Any]()
        save.running = running

        def work() -> None:
            try:
                running.set_result(save.stages[0][1](save.results))
            except BaseException as error:
                running.set_exception(error)

        threading.Thread(target=work, name=self._name(save), daemon=True).start()

    def _conclude(self, save: _Save) -> None:
        """Learn what the stage came to on all ranks, waiting for those that are not done."""
        running, save.running = save.running, None
        assert running is not None
        try:
            save.results = dist.gather_objects(dist.together(running.result))
        except FileError as error:
            save.attempts += 1
            save.wait, save.error = 2**save.attempts, str(error)
            dist.say(f"{self._name(save)} is not written yet, attempt {save.attempts} failed: {error}")
            return
        save.attempts = 0
        name, (manifest, _) = self._name(save), save.stages.pop(0)
        if not save.stages or save.manifest is not manifest:
            self.newest = self._final(manifest) if _folder(manifest) == FOLDER else self.newest
            dist.say(f"{name} is written, {time.perf_counter() - save.begun:.1f} s after its step")
        if save.stages:
            self._start(save)
        else:
            self._save = None

    def _stages(self, manifest: Manifest, parts: Sequence[tuple[str, int, torch.Tensor]]) -> list[_Stage]:
        parts = [part for part in parts if part[0].split("/")[0] in manifest.kinds]
        return [
            (manifest, lambda _: self._write(manifest, parts)),
            (manifest, lambda written: self._publish(manifest, written)),
        ]

    def _write(self, manifest: Manifest, parts: Sequence[tuple[str, int, torch.Tensor]]) -> dict[str, Fingerprint]:
        """This rank's file."""
        assert self._staging is not None
        self._staging.wait()
        temporary = self._temporary(manifest)
        if dist.rank() == 0:
            for given_up in temporary.parent.glob(".step-*.tmp"):
                if given_up != temporary:
                    shutil.rmtree(given_up, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
        path = temporary / file_name(dist.rank())
        try:
            return {path.name: write_file(path, [Range(*part) for part in parts])}
        except OSError:
            path.unlink(missing_ok=True)  # the room that it takes may be what others lack
            raise

    def _publish(self, manifest: Manifest, written: Sequence[dict[str, Fingerprint]]) -> None:
        """Rank 0: one rename makes it visible; only then does anything older go."""
        if dist.rank() != 0:
            return
        files = {name: entry for of_rank in written for name, entry in of_rank.items()}
        temporary, final = self._temporary(manifest), self._final(manifest)
        if temporary.exists() or not final.exists():  # else it was renamed before something failed
            for name, entry in files.items():
                if (temporary / name).stat().st_size != entry.bytes:
                    raise OSError(f"{temporary / name} is not of the size that was written")
            write_atomically(temporary / MANIFEST, replace(manifest, files=files).to_json())
            sync_folder(temporary)
            temporary.rename(final)
            sync_folder(final.parent)
        if _folder(manifest) == FOLDER:
            self._point_at(final)
            self._drop_older()

    def _point_at(self, path: Path) -> None:
        write_atomically(self.folder / LATEST, f"{path.name}\n".encode())

    def _drop_older(self) -> None:
        """Hidden first: one that is half deleted is not a checkpoint."""
        every = self.settings.keep_every
        for path in checkpoint_paths(self.run)[: -self.settings.keep_last]:
            if not every or step_of(path) % every:
                path.rename(path.with_name(f".{path.name}.old"))
        for hidden in self.folder.glob(".step-*.old"):
            shutil.rmtree(hidden, ignore_errors=True)

    def _temporary(self, manifest: Manifest) -> Path:
        final = self._final(manifest)
        return final.with_name(f".{final.name}.tmp")

    def _final(self, manifest: Manifest) -> Path:
        return self.run / _folder(manifest) / checkpoint_name(manifest.step)

    def _name(self, save: _Save) -> str:
        return f"{'checkpoint' if _folder(save.manifest) == FOLDER else 'snapshot'} {self._final(save.manifest)}"


def _folder(manifest: Manifest) -> str:
    return FOLDER if "model" in manifest.kinds else AVERAGES


def _own_vectors(engine: Engine, ema: EMA) -> list[tuple[str, int, torch.Tensor]]:
    """What this rank writes of what it owns. Where several ranks own the same, each writes an equal part of it."""
    copies = engine.copies
    copy = dist.rank() // (dist.world() // copies)
    parts = []
    for key, start, tensor in state_vectors(engine, ema):
        begin, end = (tensor.numel() * at // copies for at in (copy, copy + 1))
        parts.append((key, start + begin, tensor[begin:end]))
    return parts
