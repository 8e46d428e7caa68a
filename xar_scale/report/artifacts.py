"""What a run keeps: checkpoints by their manifests, pictures of samples, evaluations. What is damaged is shown as that."""

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xar_scale.checkpoint.manifest import FOLDER, LATEST, Manifest, checkpoint_paths, read_manifest
from xar_scale.errors import XarScaleError

SAMPLES, EVALUATION_FILE = "samples", "evaluation.json"
MAX_GRIDS = 24  # on the page at most
NEWEST_SIDE, EARLIER_SIDE = 1600, 480  # pixels on the longer side


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint's folder."""

    name: str
    latest: bool  # the pointer names it
    manifest: Manifest | None
    problem: str  # why it does not count, if so


@dataclass(frozen=True)
class SampleGrid:
    """Samples drawn after ``step`` steps, as a data: URI, or what is wrong with them."""

    step: int
    uri: str
    problem: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.json; ``step``: of the weights; ``images``: of which the numbers are, and with which they change."""

    name: str  # of its folder, in the run's
    step: int | None
    images: int | None
    metrics: dict[str, Any]
    details: str  # all that it says
    problem: str


def checkpoints(run: Path) -> list[CheckpointEntry]:
    """By step, then those that were set aside. Manifests are read; files are not hashed, nor looked for."""
    pointer = run / FOLDER / LATEST
    latest = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    aside = "set aside: damaged, or from a later step than the one the run resumed from"
    folders = [(path, "") for path in checkpoint_paths(run)]
    folders += [(path, aside) for path in sorted((run / FOLDER).glob("damaged-step-*")) if path.is_dir()]
    found = []
    for path, problem in folders:
        manifest = None
        try:
            manifest = read_manifest(path).manifest
        except (XarScaleError, OSError) as error:
            problem = problem or str(error).removeprefix(f"checkpoint {path}").lstrip(": ")  # the page names it
        found.append(CheckpointEntry(path.name, path.name == latest, manifest, problem))
    return found


def sample_grids(run: Path) -> list[SampleGrid]:
    """Oldest first. Of very many an even choice, the first and the newest among them."""
    named = ((re.fullmatch(r"step-(\d{8,})\.png", path.name), path) for path in (run / SAMPLES).glob("step-*.png"))
    files = sorted((int(match[1]), path) for match, path in named if match)
    if len(files) > MAX_GRIDS:
        files = [files[round(n * (len(files) - 1) / (MAX_GRIDS - 1))] for n in range(MAX_GRIDS)]
    return [_sample_grid(step, path, NEWEST_SIDE if path == files[-1][1] else EARLIER_SIDE) for step, path in files]


def _sample_grid(step: int, path: Path, side: int) -> SampleGrid:
    """A JPEG of at most ``side`` pixels each way: a page of PNGs would have tens of MB."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # pillow has no class of its own
        return SampleGrid(step, "", f"{path.name} cannot be shown: {error}")
    image.thumbnail((side, side))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90, subsampling=0)
    return SampleGrid(step, "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode(), "")


def evaluations(run: Path) -> list[Evaluation]:
    """In order of the weights' steps."""
    found = [_evaluation(run, path) for path in run.rglob(EVALUATION_FILE)]
    return sorted(found, key=lambda entry: (entry.step is None, entry.step, entry.name))


def _evaluation(run: Path, path: Path) -> Evaluation:
    name = str(path.parent.relative_to(run))
    try:
        values = json.loads(path.read_text())
        metrics = dict(values["metrics"])
        step, images = values.get("weights", {}).get("step"), dict(values.get("set", {})).get("images")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Evaluation(name, None, None, {}, "", f"{path} is torn or not an evaluation ({type(error).__name__})")
    step, images = (value if isinstance(value, int) else None for value in (step, images))
    return Evaluation(name, step, images, metrics, json.dumps(values, indent=1), "")
