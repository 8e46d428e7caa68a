"""A set of generated images in a folder: numbered, in parts, drawn by any number of ranks and gone on with after an end."""

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xar_scale import dist
from xar_scale.errors import DataError, UsageError
from xar_scale.evaluate.generate import Generator
from xar_scale.evaluate.images import PART
from xar_scale.files import write_atomically

DESCRIPTION, MADE_WITH = "set.json", "drawn_with"
SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class ImageSet:
    """``count`` images of ``classes`` classes in turn: image n is of class n modulo ``classes``, and drawn from (seed, n).

    So neither the number of ranks nor an end in the middle tells in it, and any first images are as balanced as can be.
    ``origin``: all else that they depend on, in plain values, which the folder keeps. ``here``: versions and device, which it
    keeps too, of all that have drawn of the set.
    """

    folder: Path
    count: int
    classes: int
    seed: int
    origin: dict[str, Any]
    here: dict[str, str]

    @property
    def description(self) -> dict[str, Any]:
        """All that the images depend on."""
        return {"images": self.count, "classes": self.classes, "seed": self.seed, **self.origin}

    @property
    def parts(self) -> int:
        return -(-self.count // PART)

    @property
    def labels(self) -> np.ndarray:
        """(N,)"""
        return np.arange(self.count) % self.classes

    def numbers(self, part: int) -> range:
        return range(part * PART, min((part + 1) * PART, self.count))

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npy"

    def missing(self) -> list[int]:
        return [part for part in range(self.parts) if not self.path(part).is_file()]

    def read(self, part: int) -> np.ndarray:
        """uint8 images (N, I, H, W). Raises DataError where the file is torn or another's."""
        path, count = self.path(part), len(self.numbers(part))
        try:
            with path.open("rb") as file:  # not what else np.load takes for one
                images: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError):
            raise DataError(f"{path} is torn; without the file, its images are drawn anew") from None
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != count:
            raise DataError(
                f"{path} is {images.dtype}{images.shape}, not {count} images; without the file, they are drawn anew"
            )
        return images

    def open(self) -> None:
        """Make the folder, or find the same set in it. Raises UsageError where it holds another, or nobody knows which."""
        wanted = self.description
        if there := self._described():
            for key in sorted({*there, *wanted} - {MADE_WITH}):
                if there.get(key) != wanted.get(key):
                    differ = f"{key} is {there.get(key)} there, {wanted.get(key)} here"
                    raise UsageError(f"{self.folder} holds another set: {differ}; name another --out")
            if self.missing():
                self._describe(_both(there[MADE_WITH], self.here))
            return
        if any(self.folder.glob("part-*.npy")):
            raise UsageError(f"{self.folder} holds images of a set that nothing describes: {DESCRIPTION} is missing")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._describe(self.here)

    def made_with(self) -> dict[str, str]:
        """Versions and device, as the folder has them."""
        found: dict[str, str] = self._described()[MADE_WITH]
        return found

    def _describe(self, made_with: dict[str, str]) -> None:
        content = json.dumps(self.description | {MADE_WITH: made_with}, indent=1)
        write_atomically(self.folder / DESCRIPTION, content.encode())

    def _described(self) -> dict[str, Any]:
        """Nothing where there is none."""
        path = self.folder / DESCRIPTION
        if not path.is_file():
            return {}
        try:
            there = json.loads(path.read_text())
            assert isinstance(there, dict) and isinstance(there[MADE_WITH], dict)
        except (ValueError, KeyError, AssertionError):
            raise DataError(f"{path} is torn or changed") from None
        return there

    def draw(self, generator: Generator) -> None:
        """What is missing. Every rank calls this; each takes parts, neighbours that share the weights at the same time."""
        missing = dist.on_rank_0(self.missing)
        there = self.parts - len(missing)
        dist.say(f"{self.folder}: {self.count:,} images in {self.parts} parts, {there} of them there already")
        begun = said = time.monotonic()
        batches = -(-PART // generator.settings.batch) if generator.shared else 0
        for first in range(0, len(missing), dist.world()):
            mine = missing[first : first + dist.world()][dist.rank() :][:1]
            # nobody is so far behind that others give up waiting, nor waits for one who failed; at the end all parts are there
            dist.on_all_ranks(partial(self._draw, generator, mine, batches))
            if dist.rank() == 0 and time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                self._say(missing, said - begun)

    def _draw(self, generator: Generator, mine: Sequence[int], batches: int) -> None:
        for part in mine:
            numbers = self.numbers(part)
            labels = self.labels[numbers.start : numbers.stop].tolist()
            _save(self.path(part), generator.draw(labels, self.seed, numbers.start, batches))
        if generator.shared and not mine:
            generator.draw([], batches=batches)

    def _say(self, missing: list[int], seconds: float) -> None:
        """How far all ranks are, and when they will be done: after ``seconds``, ``missing`` parts at first."""
        images = lambda parts: sum(len(self.numbers(part)) for part in parts)  # noqa: E731
        left = images(self.missing())
        rate = (images(missing) - left) / seconds
        print(f"{self.count - left:,}/{self.count:,} images  {rate:.1f} images/s  ETA {left / rate:.0f} s", flush=True)


def _both(there: dict[str, str], here: dict[str, str]) -> dict[str, str]:
    """Versions and devices of those who drew before and of who goes on."""
    values = {name: [*there.get(name, "").split(", "), here.get(name, "")] for name in {**there, **here}}
    return {name: ", ".join(dict.fromkeys(filter(None, given))) for name, given in values.items()}


def _save(path: Path, images: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, images)
    write_atomically(path, buffer.getbuffer())
