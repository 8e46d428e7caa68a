"""What is written of a step that failed: who, where, which samples, what was tried; and the batch, to run it again."""

import json
import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.data.loader import Batch
from xar_scale.diagnosis import Activations, Watch
from xar_scale.engines import Engine
from xar_scale.errors import DataError, UsageError
from xar_scale.files import free_name, write_atomically
from xar_scale.guard import Bad, Decision, Event

FOLDER, FORMAT = "reports", 1


@dataclass
class RankReport:
    """What one rank saw of it."""

    rank: int
    host: str
    device: str
    bad: list[str]  # of its own, at the first attempt
    forward: str | None = None  # the first module whose output was not finite, when it was attempted again
    backward: str | None = None  # the first module whose output's gradient was not
    activations: dict[str, float | None] | None = None  # the largest of each block; none where it is not finite


class Report:
    """One failed step, as it is being resolved. Made, filled and written by all ranks together."""

    def __init__(
        self, config: Config, engine: Engine, shards: Sequence[str], run: Path, step: int, batches: Sequence[Batch]
    ) -> None:
        self.config, self.shards, self.folder, self.step, self.batches = config, shards, run / FOLDER, step, batches
        self.attempts: list[dict[str, Any]] = []
        device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
        mine = f"{device} {engine.device.index or 0}"
        self.rank = RankReport(dist.rank(), socket.gethostname(), mine, names(engine.local_bad))

    def add(self, mode: str, loss_scale: float, event: Event, decision: Decision) -> None:
        """One attempt, and what was decided."""
        values = {"mode": mode, "loss_scale": loss_scale, "bad": names(event.bad)}
        values |= {"loss": number(event.loss), "grad_norm": number(event.grad_norm)}
        self.attempts.append(values | {"action": decision.action.value, "reason": decision.reason})

    def add_observations(self, watch: Watch, activations: Activations) -> None:
        """What was seen in an attempt; of several the first that showed anything counts."""
        rank = self.rank
        if rank.activations is None or (rank.forward is rank.backward is None):
            rank.forward, rank.backward = watch.forward, watch.backward
            rank.activations = {name: number(value) for name, value in activations.largest.items()}

    def write(self, newest: Path | None) -> tuple[Path | None, str]:
        """Rank 0 writes the report, the first culprit its batch. Returns where (none, on a rank that could not), and in a few
        words whom it was traced to."""
        ranks = dist.gather_objects(self.rank)
        culprits = _culprits(ranks)
        chosen = culprits[0] if culprits else ranks[0]
        path: Path | None = dist.on_rank_0(lambda: free_name(self.folder / f"step-{self.step:08d}.json"))
        samples = dist.gather_objects(self._samples() if dist.rank() == chosen.rank else [])[chosen.rank]
        assert path is not None
        try:
            if dist.rank() == 0:
                self._write(path, ranks, [r.rank for r in culprits], chosen.rank, samples, newest)
            if dist.rank() == chosen.rank:
                self._write_batch(path.with_suffix(".safetensors"))
        except OSError as error:  # the run is worth more
            print(f"cannot write report {path}: {error.strerror}", flush=True)
            path = None
        return path, "; ".join(map(_traced, culprits)) or "no rank in particular"

    def _write_batch(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        batch = Batch.together(self.batches).to(torch.device("cpu"))
        tensors = {name: getattr(batch, name).contiguous() for name in ("latents", "labels", "t", "noise", "places")}
        write_atomically(path, save(tensors, {"keys": json.dumps(batch.keys)}))

    def _samples(self) -> list[dict[str, Any]]:
        """What this rank's batch is made of."""
        batch = Batch.together(self.batches).to(torch.device("cpu"))
        columns = (batch.keys, batch.places.tolist(), batch.labels.tolist(), batch.t.tolist())
        norms = (batch.latents.flatten(1).norm(dim=1).tolist(), batch.noise.flatten(1).norm(dim=1).tolist())
        return [
            {
                "key": key,
                "shard": self.shards[shard],
                "position": position,
                "label": label,
                "t": t,
                "latent_norm": number(latent),
                "noise_norm": number(noise),
            }
            for key, (shard, position), label, t, latent, noise in zip(*columns, *norms, strict=True)
        ]

    def _write(
        self,
        path: Path,
        ranks: list[RankReport],
        culprits: list[int],
        rank: int,
        samples: list[dict[str, Any]],
        newest: Path | None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "format": FORMAT,
            "step": self.step,
            "attempts": self.attempts,
            "culprits": culprits,
            "ranks": [asdict(rank) for rank in ranks],
            "batch": {"file": path.with_suffix(".safetensors").name, "rank": rank, "passes": len(self.batches)},
            "samples": samples,
            "newest_checkpoint": newest and newest.name,
            "config": self.config.to_dict(),
        }
        write_atomically(path, json.dumps(values, indent=1).encode())


@dataclass(frozen=True)
class SavedReport:
    """A report read back."""

    path: Path
    step: int
    mode: str  # of the first attempt
    loss_scale: float
    rank: int  # whose batch it is
    batches: list[Batch]
    config: dict[str, Any]
    summary: str  # what was met and decided, a line each


def read(path: Path) -> SavedReport:
    """Raises UsageError where there is no report, DataError where it or its batch is torn or of another format."""
    with _opened(path) as values:
        file = path.with_name(values["batch"]["file"])
        try:
            tensors = load_file(file)
        except FileNotFoundError:
            raise DataError(f"report {path}: its batch {file.name} is missing") from None
        except SafetensorError as error:
            raise DataError(f"report {path}: its batch cannot be read: {error}") from None
        batch = Batch(**tensors, keys=("",) * len(tensors["labels"]))
        batches = batch.split(values["batch"]["passes"])
        first, rank = values["attempts"][0], values["batch"]["rank"]
        config, summary = values["config"], _summary(values)
        return SavedReport(path, values["step"], first["mode"], first["loss_scale"], rank, batches, config, summary)


def read_summary(path: Path) -> str:
    """``SavedReport.summary`` alone, without the batch. Raises UsageError and DataError likewise."""
    with _opened(path) as values:
        return _summary(values)


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, Any]]:
    """What a report says; in the context, what is not in it as it should be is a DataError."""
    if not path.is_file():
        raise UsageError(f"no report at {path}")
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise DataError(f"report {path} is of format {values['format']}, this version reads {FORMAT}")
        yield values
    except (ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
        raise DataError(f"report {path} is none of a step, or torn or changed ({type(error).__name__})") from None


def _summary(values: dict[str, Any]) -> str:
    whose = RankReport(**values["ranks"][values["batch"]["rank"]])
    lines = [f"step {values['step']}, {_traced(whose)}:"]
    for attempt in values["attempts"]:
        what = " and ".join(attempt["bad"]) or "nothing"
        lines.append(f"  {attempt['mode']}: not finite: {what}; {attempt['action']}, {attempt['reason']}")
    return "\n".join(lines)


def names(bad: Bad) -> list[str]:
    return [flag.name.lower() for flag in Bad if flag and flag in bad and flag.name]


def number(value: float) -> float | None:
    """As JSON has it: none where it is not finite."""
    return value if math.isfinite(value) else None


def _culprits(ranks: Sequence[RankReport]) -> list[RankReport]:
    """Those that had it first. A gradient is reduced before it is looked at: of it only what came back in a rank itself says
    whose it was."""
    for own in ("weights", "input", "loss"):
        if found := [rank for rank in ranks if own in rank.bad]:
            return found
    return [rank for rank in ranks if rank.forward] or [rank for rank in ranks if rank.backward]


def _traced(rank: RankReport) -> str:
    where = f"rank {rank.rank} ({rank.host}, {rank.device}"
    if rank.forward:
        return f"{where}; first in {rank.forward})"
    return f"{where}; backwards first behind {rank.backward})" if rank.backward else f"{where})"
