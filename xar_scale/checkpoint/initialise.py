"""Initialise a new run from other weights: take what matches, resize position embeddings to another grid, report all of it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from xar_scale.checkpoint.interop import Source
from xar_scale.checkpoint.manifest import POSITIONS
from xar_scale.config import ModelConfig, validated
from xar_scale.errors import DataError
from xar_scale.model.entities import EntityLayout, create_layout

MIN_FRACTION = 0.1  # of the model's elements: if fewer match, the source is another model


class Initialisation:
    """The initial weights that ``source`` gives a model of ``shapes``: its EMA weights if it has any, else its weights."""

    def __init__(self, source: Source, shapes: dict[str, torch.Size], config: ModelConfig) -> None:
        """Raises DataError if almost nothing matches."""
        self.source, self.shapes = source, shapes
        self.kind = "ema" if "ema" in source.kinds else "model"
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

    def value(self, name: str) -> Tensor | None:
        """Return one parameter, unsharded, in float32 on the CPU; None if the source has nothing for it."""
        if name in self.resized:
            return resize_positions(self.source.whole(f"{self.kind}/{name}"), self.resized[name], self.layout)
        return self.source.whole(f"{self.kind}/{name}") if name in self.matching else None

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
