"""A run's artifacts: checkpoints by their manifests, sample grids, evaluations. Damaged ones are listed as such."""

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from xar_scale.checkpoint.manifest import FOLDER, LATEST, Manifest, checkpoint_paths, read_manifest
from xar_scale.data.images import FORMATS
from xar_scale.errors import XarScaleError
from xar_scale.evaluate import previews
from xar_scale.evaluate.evaluation import RESULT
from xar_scale.files import parse_json

MAX_GRIDS = 24  # on the page at most
NEWEST_SIDE, EARLIER_SIDE = 1600, 480  # pixels on the longer side


@dataclass(frozen=True)
class CheckpointEntry:
    """The folder of a checkpoint."""

    name: str
    latest: bool  # the `latest` file names it
    manifest: Manifest | None
    problem: str  # why it is not usable, or empty


@dataclass(frozen=True)
class SampleGrid:
    """A grid of samples after ``step`` steps as a data: URI, or what is wrong with it."""

    step: int
    uri: str
    problem: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.json; ``step``: of the weights; ``images``: how many, on which the metrics depend."""

    name: str  # path of its folder within the run
    step: int | None
    images: int | None
    metrics: dict[str, Any]
    details: str  # the whole file
    problem: str


def checkpoints(run: Path) -> list[CheckpointEntry]:
    """Return the checkpoints by step, then those set aside. Only manifests are read; files are not checked, or even listed."""
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
            problem = problem or str(error).removeprefix(f"checkpoint {path}").lstrip(": ")  # the page shows the name anyway
        found.append(CheckpointEntry(path.name, path.name == latest, manifest, problem))
    return found


def sample_grids(run: Path) -> list[SampleGrid]:
    """Return the grids, oldest first: at most ``MAX_GRIDS``, evenly chosen, including the first and the newest."""
    named = ((re.fullmatch(r"step-(\d{8,})\.png", path.name), path) for path in (run / previews.FOLDER).glob("step-*.png"))
    files = sorted((int(match[1]), path) for match, path in named if match)
    if len(files) > MAX_GRIDS:
        files = [files[round(n * (len(files) - 1) / (MAX_GRIDS - 1))] for n in range(MAX_GRIDS)]
    return [_sample_grid(step, path, NEWEST_SIDE if path == files[-1][1] else EARLIER_SIDE) for step, path in files]


def _sample_grid(step: int, path: Path, side: int) -> SampleGrid:
    """Return the grid as a JPEG of at most ``side`` pixels per side: a page of PNGs would have tens of MB."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # pillow has no common error class
        return SampleGrid(step, "", f"{path.name} cannot be shown: {error}")
    image.thumbnail((side, side))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90, subsampling=0)
    return SampleGrid(step, "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode(), "")


def evaluations(run: Path) -> list[Evaluation]:
    """Return all evaluations below the run, by the step of the weights."""
    found = [_evaluation(run, path) for path in run.rglob(RESULT)]
    return sorted(found, key=lambda entry: (entry.step is None, entry.step, entry.name))


def _evaluation(run: Path, path: Path) -> Evaluation:
    name = str(path.parent.relative_to(run))
    try:
        values = parse_json(path.read_text())
        metrics = {name: value if isinstance(value, int | float) else str(value) for name, value in values["metrics"].items()}
        step, images = values.get("weights", {}).get("step"), values.get("set", {}).get("images")
        details = json.dumps(values, indent=1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Evaluation(name, None, None, {}, "", f"{path} is torn or not an evaluation ({type(error).__name__})")
    step, images = (value if isinstance(value, int) else None for value in (step, images))
    return Evaluation(name, step, images, metrics, details, "")
