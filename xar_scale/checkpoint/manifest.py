"""The manifest of a checkpoint, and checks of its files: detects checkpoints that are torn, changed or incomplete."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xar_scale import dist
from xar_scale.checkpoint.files import SUFFIX, Fingerprint, fingerprint
from xar_scale.data.order import Position
from xar_scale.errors import DataError, FileError, UsageError
from xar_scale.files import is_entry_name, parse_json
from xar_scale.guard import GuardState
from xar_scale.validation import STRICT, Count, validated

FORMAT = 4
FOLDER, MANIFEST, LATEST = "checkpoints", "manifest.json", "latest"
EMA_SNAPSHOTS = "ema"  # the folder of EMA snapshots; these are not checkpoints: no run resumes from them
KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")  # of vectors that training resumes from

POSITIONS = ("encoder_pos", "decoder_pos")  # (T, D) each; (1, T, D) in published files and our older ones


def our_shape(name: str, shape: Sequence[int]) -> list[int]:
    """Return our shape of parameter ``name``, stored as ``shape``. Vectors are flat, so the values are the same."""
    return [*shape[1:]] if name in POSITIONS and len(shape) == 3 and shape[0] == 1 else [*shape]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds. There is no generator state: every draw is a function of (seed, step, sample number)."""

    __pydantic_config__ = STRICT

    step: Count  # steps taken
    seed: int
    samples_consumed: Count  # in total
    position: Position  # epoch, samples consumed in it
    bad_samples: list[tuple[str, int]]  # met so far, as (shard, position in it)
    quarantined: list[tuple[str, int]]  # samples excluded by the guard, likewise
    guard: GuardState
    dataset: dict[str, Any]  # samples and fingerprint; tokenizer and latent scale, for decoding
    world: Count  # ranks that wrote it
    engine: str
    precision: str
    config: dict[str, Any]
    shapes: dict[str, list[Count]]
    kinds: tuple[str, ...] = KINDS
    sigma_rel: float | None = None  # width of a post-hoc EMA (xar_scale.posthoc)
    files: dict[str, Fingerprint] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Serialise, with a SHA-256 of everything else."""
        values = {**asdict(self), "guard": self.guard.to_dict()}
        return json.dumps({"sha256": _digest(values), **values}, indent=1).encode()

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def updates(self) -> int:
        """Updates of the weights: steps taken, minus those skipped."""
        return self.step - self.guard.skipped


def bare_manifest(**known: Any) -> Manifest:
    """Return the manifest of a state whose run is unknown. ``known``: at least the step and the shapes."""
    unknown: dict[str, Any] = {
        "seed": 0,
        "samples_consumed": 0,
        "position": Position(0, 0),
        "bad_samples": [],
        "quarantined": [],
    }
    unknown |= {"guard": GuardState(), "dataset": {}, "world": 1, "engine": "", "precision": "", "config": {}}
    return Manifest(**(unknown | known))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest could be read."""

    path: Path
    manifest: Manifest


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checkpoint_paths(run: Path, folder: str = FOLDER) -> list[Path]:
    """Return the run's checkpoints (or snapshots, in another ``folder``) by name, oldest first, valid or damaged."""
    paths = [path for path in (run / folder).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(paths, key=step_of)


def read_manifest(path: Path) -> Checkpoint:
    """Raises UsageError if there is no checkpoint, DataError if its manifest is torn, changed or of another format."""
    if not path.is_dir():
        raise UsageError(f"no checkpoint at {path}")
    try:
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise DataError(f"checkpoint {path} has no {MANIFEST}") from None
    return Checkpoint(path, parse_manifest(content, path))


def parse_manifest(content: bytes, location: Path | str) -> Manifest:
    """Parse the manifest of the checkpoint at ``location``. Raises DataError if it is torn, changed or of another format."""
    try:
        values = parse_json(content)
        if values["format"] != FORMAT:
            raise DataError(f"checkpoint {location} has format {values['format']}, this version reads {FORMAT}")
        if values.pop("sha256") != _digest(values):
            raise DataError(f"checkpoint {location}: {MANIFEST} is torn or changed")
        values["shapes"] = {name: our_shape(name, shape) for name, shape in values["shapes"].items()}
        if elsewhere := [name for name in values["files"] if not is_entry_name(name) or not name.endswith(SUFFIX)]:
            # downloads are written under these names, and others may be able to write to the mirror
            raise DataError(f"checkpoint {location}: {MANIFEST} names {elsewhere[0]!r}, which is not a checkpoint file")
        return validated(Manifest, values, DataError, f"checkpoint {location}: {MANIFEST}: ")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the last: of the digest, nested as deeply
        raise DataError(f"checkpoint {location}: {MANIFEST} is torn or changed") from None


def verify(path: Path) -> Checkpoint:
    """Check this rank's share of the files by size and SHA-256. Raises DataError naming the first that differs."""
    checkpoint = read_manifest(path)
    files = checkpoint.manifest.files
    if extra := {file.name for file in path.glob(f"*{SUFFIX}")} - set(files):
        raise DataError(f"checkpoint {path}: {min(extra)} is not listed in its manifest")
    for name in dist.mine(list(files)):
        if not (path / name).is_file():
            raise DataError(f"checkpoint {path}: {name} is missing")
        if fingerprint(path / name) != files[name]:
            raise DataError(f"checkpoint {path}: {name} is corrupt (size or checksum differs)")
    return checkpoint


def newest_valid(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose files all match its manifest; None if the run has no checkpoint at all.

    A damaged checkpoint is reported, and the one before it is tried. If a running job drops one during the check, there is a
    newer one, so the search starts over. Raises DataError if there are checkpoints but none is valid.
    Every rank calls this and checks a share of the files.
    """
    paths = dist.on_rank_0(lambda: checkpoint_paths(run))
    for path in reversed(paths):
        try:
            return dist.on_all_ranks(lambda at=path: verify(at))  # type: ignore[misc]
        except (DataError, UsageError, FileError) as error:  # other exceptions are bugs: this rank joins no more collectives
            if not dist.on_rank_0(path.is_dir):
                return newest_valid(run)
            if not isinstance(error, DataError):
                raise
            dist.say(f"{error}; trying the checkpoint before it")
    if paths:
        raise DataError(f"none of the {len(paths)} checkpoints in {run / FOLDER} is valid; use another --run-dir to start anew")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Return a run's newest valid checkpoint, or the one in ``path`` itself. Every rank calls this and checks a share of it.

    Raises UsageError if there is none, DataError if none is valid.
    """
    if not (path / FOLDER).is_dir():
        return dist.on_all_ranks(lambda: verify(path))
    newest = newest_valid(path)
    if newest is None:
        raise UsageError(f"no checkpoint in {path}")
    return newest


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of plain values, unchanged by a round trip through JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
