"""Reports of failed steps: ranks, devices, samples and attempts, with the batch to run it again."""

import json
import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.data.loader import Batch
from xar_scale.diagnosis import Activations, Watch
from xar_scale.engines import Engine
from xar_scale.errors import DataError, UsageError, is_damage
from xar_scale.files import free_name, parse_json, write_atomically
from xar_scale.guard import Bad, Decision, Event
from xar_scale.precision import MODES
from xar_scale.validation import STRICT, Count, validated

FOLDER, FORMAT = "reports", 1


@dataclass
class RankReport:
    """What one rank observed."""

    rank: int
    host: str
    device: str
    bad: list[str]  # what was not finite on this rank, at the first attempt
    forward: str | None = None  # the first module whose output was not finite, when the step was retried
    backward: str | None = None  # the first module whose output's gradient was not finite
    activations: dict[str, float | None] | None = None  # the largest of each block; None: not finite


class Report:
    """A failed step while it is being resolved. All ranks create, fill and write it together."""

    def __init__(
        self, config: Config, engine: Engine, shards: Sequence[str], run: Path, step: int, batches: Sequence[Batch]
    ) -> None:
        self.config, self.shards, self.folder, self.step, self.batches = config, shards, run / FOLDER, step, batches
        self.attempts: list[dict[str, Any]] = []
        device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
        mine = f"{device} {engine.device.index or 0}"
        self.rank = RankReport(dist.rank(), socket.gethostname(), mine, names(engine.local_bad))

    def add(self, mode: str, loss_scale: float, event: Event, decision: Decision) -> None:
        """Add one attempt, and what was decided."""
        values = {"mode": mode, "loss_scale": loss_scale, "bad": names(event.bad)}
        values |= {"loss": number(event.loss), "grad_norm": number(event.grad_norm)}
        self.attempts.append(values | {"action": decision.action.value, "reason": decision.reason})

    def add_observations(self, watch: Watch, activations: Activations) -> None:
        """Add what was observed in an attempt. Of several attempts, the first one that showed anything counts."""
        rank = self.rank
        if rank.activations is None or (rank.forward is rank.backward is None):
            rank.forward, rank.backward = watch.forward, watch.backward
            rank.activations = {name: number(value) for name, value in activations.largest.items()}

    def write(self, newest: Path | None) -> tuple[Path | None, str]:
        """Rank 0 writes the report, and the first culprit its batch.

        Returns the path (None on a rank that failed to write), and a short text of whom the failure was traced to.
        """
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
        except OSError as error:  # a missing report must not end the run
            print(f"cannot write report {path}: {error.strerror}", flush=True)
            path = None
        return path, "; ".join(map(_traced, culprits)) or "no rank in particular"

    def _write_batch(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        batch = Batch.concatenate(self.batches).to(torch.device("cpu"))
        tensors = {name: getattr(batch, name).contiguous() for name in ("latents", "labels", "t", "noise", "places")}
        write_atomically(path, save(tensors, {"keys": json.dumps(batch.keys)}))

    def _samples(self) -> list[dict[str, Any]]:
        """Describe the samples of this rank's batch."""
        batch = Batch.concatenate(self.batches).to(torch.device("cpu"))
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
    """A report, read back."""

    path: Path
    step: int
    mode: str  # of the first attempt
    loss_scale: float
    rank: int  # the rank that the batch belongs to
    batches: list[Batch]
    config: dict[str, Any]
    summary: str  # what was found and decided, a line per attempt


@dataclass(frozen=True)
class _Facts:
    """What a replay needs of a report, besides the batch."""

    __pydantic_config__ = STRICT

    step: Count
    mode: str
    loss_scale: PositiveFloat
    rank: Count
    passes: PositiveInt
    config: dict[str, Any]


def read(path: Path) -> SavedReport:
    """Read a report and its batch.

    Raises UsageError if there is no report, DataError if it or its batch is torn or has another format.
    """
    with _opened(path) as values:
        first, of_batch = values["attempts"][0], values["batch"]
        given = {name: values[name] for name in ("step", "config")}
        given |= {name: first[name] for name in ("mode", "loss_scale")} | {name: of_batch[name] for name in ("rank", "passes")}
        facts = validated(_Facts, given, DataError, f"report {path}: ")
        if facts.mode not in MODES:
            raise DataError(f"report {path}: mode {facts.mode!r} is none of {', '.join(MODES)}")
        file = path.with_name(of_batch["file"])
        try:
            tensors = load_file(file)
        except FileNotFoundError:
            raise DataError(f"report {path}: its batch {file.name} is missing") from None
        except SafetensorError as error:
            raise DataError(f"report {path}: its batch cannot be read: {error}") from None
        batch = Batch(**tensors, keys=("",) * len(tensors["labels"]))
        batches = batch.split(facts.passes)
        return SavedReport(path, facts.step, facts.mode, facts.loss_scale, facts.rank, batches, facts.config, _summary(values))


def read_summary(path: Path) -> str:
    """``SavedReport.summary`` alone, without the batch. Raises UsageError and DataError likewise."""
    with _opened(path) as values:
        return _summary(values)


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, Any]]:
    """Open a report's values. In the context, a missing or malformed value raises DataError."""
    if not path.is_file():
        raise UsageError(f"no report at {path}")
    try:
        values = parse_json(path.read_text())
        if values["format"] != FORMAT:
            raise DataError(f"report {path} has format {values['format']}, this version reads {FORMAT}")
        yield values
    except Exception as error:
        if not is_damage(error):
            raise
        raise DataError(f"report {path} is no step report, or is torn or changed ({type(error).__name__})") from None


def _summary(values: dict[str, Any]) -> str:
    whose = RankReport(**dict(enumerate(values["ranks"]))[values["batch"]["rank"]])  # -1 is no rank
    lines = [f"step {values['step']}, {_traced(whose)}:"]
    for attempt in values["attempts"]:
        what = " and ".join(attempt["bad"]) or "nothing"
        lines.append(f"  {attempt['mode']}: not finite: {what}; {attempt['action']}, {attempt['reason']}")
    return "\n".join(lines)


def names(bad: Bad) -> list[str]:
    return [flag.name.lower() for flag in Bad if flag and flag in bad and flag.name]


def number(value: float) -> float | None:
    """Return a JSON number: None if ``value`` is not finite."""
    return value if math.isfinite(value) else None


def _culprits(ranks: Sequence[RankReport]) -> list[RankReport]:
    """Return the ranks on which it started.

    A gradient is checked after its reduction, when it is bad on all ranks. Only the module observations of a rank tell whose it
    was.
    """
    for own in ("weights", "input", "loss"):
        if found := [rank for rank in ranks if own in rank.bad]:
            return found
    return [rank for rank in ranks if rank.forward] or [rank for rank in ranks if rank.backward]


def _traced(rank: RankReport) -> str:
    where = f"rank {rank.rank} ({rank.host}, {rank.device}"
    if rank.forward:
        return f"{where}; first in {rank.forward})"
    return f"{where}; first in the gradient of {rank.backward}'s output)" if rank.backward else f"{where})"
