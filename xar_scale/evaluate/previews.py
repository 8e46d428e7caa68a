"""Sample with the EMA weights during training: a grid with fixed classes and seeds, and the metrics of a small set."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from xar_scale import dist
from xar_scale.config import Config
from xar_scale.data.shards import DatasetInfo
from xar_scale.ema import EMA
from xar_scale.engines import Engine
from xar_scale.errors import ConfigError, DataError, NonFiniteError, UsageError
from xar_scale.evaluate.classes import title
from xar_scale.evaluate.evaluation import Comparison, settings_of, write
from xar_scale.evaluate.generate import Generator
from xar_scale.evaluate.images import PART
from xar_scale.evaluate.output import draw_grid, png_bytes
from xar_scale.files import write_atomically
from xar_scale.tokenizers import create_tokenizer

FOLDER = "samples"
BATCH = 16  # images at most: their key/value caches need memory on top of training's
CLASSES, SEEDS = 8, 4  # default rows of a grid, and images per row


@dataclass(frozen=True)
class Preview:
    """Results of one step by name: PNGs (on rank 0 only) and metrics."""

    pictures: dict[str, bytes] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


class Previews:
    """Generates previews with the engine's sharded weights: EMA weights are swapped in and gathered block by block."""

    def __init__(self, config: Config, run: Path, engine: Engine, ema: EMA, dataset: DatasetInfo) -> None:
        """Every rank calls this.

        Raises ConfigError, UsageError or DataError now, before training starts, instead of at the first preview.
        """
        self.config, self.run, self.engine, self.ema, self.dataset = config, run, engine, ema, dataset
        if not (config.sample.every or config.evaluate.every):
            return
        self.tokenizer = dist.on_all_ranks(
            lambda: create_tokenizer(dataset.tokenizer, config.sample.tokenizer_weights, engine.device)
        )
        if config.evaluate.every:
            if config.evaluate.images < dist.world():
                raise ConfigError(f"evaluate.images {config.evaluate.images} is less than one per rank ({dist.world()} ranks)")
            weights = Path(config.evaluate.inception_weights) if config.evaluate.inception_weights else None
            self.comparison = Comparison(config.evaluate.reference, config.evaluate.features, engine.device, weights)

    def due(self, done: int) -> bool:
        return self._due(self.config.sample.every, done) or self._due(self.config.evaluate.every, done)

    def _due(self, every: int | None, done: int) -> bool:
        return every is not None and (done % every == 0 or done == self.config.train.steps)

    def take(self, done: int, updates: int) -> Preview:
        """Make the preview after ``done`` steps, of which ``updates`` updated the weights. Every rank calls this."""
        pictures: dict[str, bytes] = {}
        numbers: dict[str, float] = {}
        with self.engine.ema_weights(self.ema.averages["ema"], updates) as model:
            device, compute = self.engine.device, self.engine.precision.compute
            scale = self.dataset.latent_scale
            settings = replace(self.config.sample, batch=min(self.config.sample.batch, BATCH))
            generator = Generator(model, settings, self.tokenizer, scale, device, compute, shared=True)
            if self._due(self.config.sample.every, done):
                with _errors_logged(f"step {done}: no samples"):
                    pictures = self._grid(generator, done)
            if self._due(self.config.evaluate.every, done):
                with _errors_logged(f"step {done}: no metrics"):
                    numbers = self._measure(generator, done)
        return Preview(pictures, numbers)

    def _grid(self, generator: Generator, done: int) -> dict[str, bytes]:
        shown = self.config.sample.shown or _evenly_spaced(self.config.model.classes)
        labels = [label for label in shown for _ in range(SEEDS)]
        images = generator.draw_over_ranks(labels, [*range(SEEDS)] * len(shown))
        if dist.rank() != 0:
            return {}
        known = self.config.model.classes
        rows = {title(label, known): images[number * SEEDS : (number + 1) * SEEDS] for number, label in enumerate(shown)}
        png = png_bytes(draw_grid(rows))
        path = self.run / FOLDER / f"step-{done:08d}.png"
        with _errors_logged(f"{path} cannot be written"):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, png)
        return {"samples": png}

    def _measure(self, generator: Generator, done: int) -> dict[str, float]:
        settings = self.config.evaluate
        images = _LazyImages(generator, settings.images, self.config.model.classes)
        set_ = {"images": settings.images, "classes": images.classes, "seed": 0, "vectors": "ema"}
        set_ |= {"tokenizer": self.dataset.tokenizer, **settings_of(generator.settings, self.config.kernels, self.engine.mode)}
        drawn = {"set": set_, "weights": {"path": str(self.run), "step": done}}
        result = self.comparison.evaluate(images, None, drawn)
        folder = self.run / "evaluations" / f"training-step-{done:08d}"
        if dist.rank() == 0:
            with _errors_logged(f"{folder} cannot be written"):
                write(folder, result)
        return {name: value for name, value in result["metrics"].items() if not name.startswith("held_out")}


@dataclass(frozen=True)
class _LazyImages:
    """Images that are generated when they are read and not stored; each rank has the same number of parts."""

    generator: Generator
    count: int
    classes: int

    @property
    def parts(self) -> int:
        return dist.world() * -(-self.count // (dist.world() * PART))

    def read(self, part: int) -> np.ndarray:
        start, stop = (self.count * at // self.parts for at in (part, part + 1))
        batches = math.ceil(math.ceil(self.count / self.parts) / self.generator.settings.batch)
        return self.generator.draw([number % self.classes for number in range(start, stop)], 0, start, batches)


@contextmanager
def _errors_logged(what: str) -> Iterator[None]:
    """Log errors and continue: neither a full disk nor a non-finite image should end a run."""
    try:
        yield
    except (OSError, UsageError, DataError, NonFiniteError) as error:  # either on all ranks, or on rank 0 in writing
        dist.say(f"{what}: {dist.known_error(error)}")


def _evenly_spaced(classes: int) -> Sequence[int]:
    """Return up to ``CLASSES`` evenly spaced classes."""
    return sorted({round(number) for number in np.linspace(0, classes - 1, CLASSES)})
