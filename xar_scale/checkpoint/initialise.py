"""Initialise a new run from other weights: take what matches, resize position embeddings to another grid, report all of it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from xar_scale import dist
from xar_scale.checkpoint.interop import Source, open_source
from xar_scale.checkpoint.manifest import POSITIONS, verify
from xar_scale.checkpoint.reshard.writer import verify_source
from xar_scale.config import ModelConfig
from xar_scale.errors import DataError
from xar_scale.model.entities import EntityLayout, create_layout
from xar_scale.validation import validated

READERS = 16  # each reads the headers of all files; more would hardly read the values faster
MIN_FRACTION = 0.1  # of the model's elements: if fewer match, the source is another model


class Initialisation:
    """The initial weights that ``source`` gives a model of ``shapes``: its EMA weights if it has any, else its weights."""

    def __init__(self, source: Source, shapes: dict[str, torch.Size], config: ModelConfig) -> None:
        """Raises DataError if almost nothing matches."""
        self.source, self.shapes = source, shapes
        self.kind = source.best_kind
        self.source_shapes = source.names(self.kind)
        self.layout = create_layout(config)
        self.matching = {name for name, shape in shapes.items() if self.source_shapes.get(name) == shape}
        self.resized: dict[str, EntityLayout] = {}  # name -> its layout in the source
        for name in POSITIONS:
            before = self._source_layout(name, config)
            if before is not None and not _same(before, self.layout):
                self.resized[name] = before
        self.matching -= set(self.resized)
        if self._elements(self.fits) < MIN_FRACTION * self._elements(shapes):
            raise DataError(
                f"{source.path} matches {self._elements(self.fits):,} of this model's {self._elements(shapes):,} elements: "
                f"it is another model ({self._mismatch(next(name for name in shapes if name not in self.fits))})"
            )

    @property
    def fits(self) -> set[str]:
        return self.matching | set(self.resized)

    def _elements(self, names: Iterable[str]) -> int:
        return sum(self.shapes[name].numel() for name in names)

    def _mismatch(self, name: str) -> str:
        if name not in self.source_shapes:
            return f"{name}: not in the source"
        return f"{name}: {tuple(self.source_shapes[name])} in the source, {tuple(self.shapes[name])} here"

    def _source_layout(self, name: str, config: ModelConfig) -> EntityLayout | None:
        """Weights without a config are assumed to be for cells on a square grid, like the published ones."""
        shape = self.source_shapes.get(name)
        if shape is None or len(shape) != 2 or shape[1] != self.shapes[name][1]:
            return None
        if self.source.manifest is not None and (model := self.source.manifest.config.get("model")):
            return create_layout(validated(ModelConfig, model, DataError, f"{self.source.path}: "))
        side = math.isqrt(shape[0])
        if side * side != shape[0]:
            return None
        return create_layout(replace(config, grid=(side, side), entity="cell", entity_size=None))

    def value(self, name: str) -> Tensor:
        """Return one parameter of ``fits``, unsharded, in float32 on the CPU."""
        value = self.source.whole(f"{self.kind}/{name}")
        return resize_positions(value, self.resized[name], self.layout) if name in self.resized else value

    def report(self) -> Iterator[str]:
        """Yield what was taken and what was not, one line each."""
        fits = self.fits
        what = "EMA weights" if self.kind == "ema" else "weights"
        yield (
            f"initialised from the {what} of {self.source.path} ({self.source.format}): {len(fits)} of {len(self.shapes)} "
            f"parameters, {self._elements(fits):,} of {self._elements(self.shapes):,} elements"
        )
        for name, before in self.resized.items():
            done = "reordered" if before.grids == self.layout.grids else "resized"
            yield f"  {done}: {name}: {_described(before)} in the source, {_described(self.layout)} here"
        for name in self.shapes:
            if name not in fits:
                yield f"  newly initialised: {self._mismatch(name)}"
        if unused := sorted(set(self.source_shapes) - set(self.shapes)):
            yield f"  not used: {len(unused)} parameters of the source, first {unused[0]}"


class SharedInitialisation:
    """The initial weights that the source at ``path`` gives a model of ``shapes``, for all ranks. A context manager.

    Everything is read once, by the first READERS ranks, each of which reads a parameter at a time and sends it to all. Every
    rank makes the same calls.
    """

    def __init__(self, path: Path, shapes: dict[str, torch.Size], config: ModelConfig) -> None:
        """Raises DataError if almost nothing matches, or if the source is not as it was written."""
        self.shapes, self.readers = shapes, min(READERS, dist.world())
        self._opened = ExitStack()
        self._found: Initialisation | None = None  # on a rank that reads
        chosen = dist.on_rank_0(lambda: self._open(path, config))  # of a run that is training, there is a newer one any moment
        dist.on_all_ranks(lambda: self._open(chosen, config) if 0 < dist.rank() < self.readers else None)
        own, self.report, self.given = dist.on_rank_0(self._describe)  # a checkpoint of ours, or None; lines; names
        if own is not None:
            dist.on_all_ranks(lambda: verify(own))
        self._values = self._read()

    def _open(self, path: Path, config: ModelConfig) -> Path:
        source = self._opened.enter_context(open_source(path))
        self._found = Initialisation(source, self.shapes, config)
        return source.path

    def _describe(self) -> tuple[Path | None, list[str], list[str]]:
        assert self._found is not None
        source, fits = self._found.source, self._found.fits
        if source.manifest is None:
            verify_source(source, lambda count: None)
        own = None if source.manifest is None else source.path
        return own, [*self._found.report()], [name for name in self.shapes if name in fits]

    def _read(self) -> Iterator[Tensor]:
        for first in range(0, len(self.given), self.readers):
            names = self.given[first : first + self.readers]
            read = dist.on_all_ranks(partial(self._read_own, names))
            for reader, name in enumerate(names):
                yield dist.broadcast(torch.empty(self.shapes[name]) if read is None or reader != dist.rank() else read, reader)

    def _read_own(self, names: Sequence[str]) -> Tensor | None:
        mine = names[dist.rank() : dist.rank() + 1]
        return self._found.value(mine[0]) if self._found is not None and mine else None

    def take(self, name: str) -> Tensor | None:
        """Return a parameter, unsharded, in float32; None if the source does not give it. In the order of ``shapes``."""
        return next(self._values) if name in self.given else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def resize_positions(positions_TD: Tensor, before: EntityLayout, after: EntityLayout) -> Tensor:
    """Convert learned positions (T, D) from one layout to another, which may have another grid or other entities.

    A level of the pyramid that both layouts have is copied; others are interpolated (bicubic) from the finest one.
    """
    starts = accumulate((math.prod(grid) for grid in before.grids), initial=0)
    raster = positions_TD[torch.argsort(before.order)].T[None]  # (1, D, T), grid after grid
    levels = {grid: raster[:, :, start : start + math.prod(grid)] for grid, start in zip(before.grids, starts, strict=False)}
    finest = levels[before.grid].unflatten(2, before.grid)
    found = [
        levels[grid] if grid in levels else F.interpolate(finest, grid, mode="bicubic", antialias=True).flatten(2)
        for grid in after.grids
    ]
    return torch.cat(found, dim=2)[0].T[after.order].contiguous()


def _same(one: EntityLayout, other: EntityLayout) -> bool:
    return one.grids == other.grids and torch.equal(one.order, other.order)


def _described(layout: EntityLayout) -> str:
    return f"{layout.entities} entities on {layout.grid[0]}x{layout.grid[1]}"
