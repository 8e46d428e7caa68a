"""A new run's weights from those of another: what fits is taken, positions are resized to another grid, all of it is said."""

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

MIN_FRACTION = 0.1  # of the model's elements: with fewer it was another that was meant


class Initialisation:
    """What ``source`` has for a model of ``shapes``: its averages where it has some, else its weights."""

    def __init__(self, source: Source, shapes: dict[str, torch.Size], config: ModelConfig) -> None:
        """Raises DataError where next to nothing fits."""
        self.source, self.shapes = source, shapes
        self.kind = "ema" if "ema" in source.kinds else "model"
        self.source_shapes = source.names(self.kind)
        self.layout = create_layout(config)
        self.matching = {name for name, shape in shapes.items() if self.source_shapes.get(name) == shape}
        self.resized: dict[str, EntityLayout] = {}  # by name, what they are laid out as there
        for name in POSITIONS:
            before = self._source_layout(name, config)
            if before is not None and not _same(before, self.layout):
                self.resized[name] = before
        self.matching -= set(self.resized)
        if self._elements(self.fits) < MIN_FRACTION * self._elements(shapes):
            raise DataError(
                f"{source.path} holds {self._elements(self.fits):,} of this model's {self._elements(shapes):,} elements: it is "
                f"of another ({self._missing(next(name for name in shapes if name not in self.fits))})"
            )

    @property
    def fits(self) -> set[str]:
        return self.matching | set(self.resized)

    def _elements(self, names: Iterable[str]) -> int:
        return sum(self.shapes[name].numel() for name in names)

    def _missing(self, name: str) -> str:
        if name not in self.source_shapes:
            return f"{name}: not there"
        return f"{name}: {tuple(self.source_shapes[name])} there, {tuple(self.shapes[name])} here"

    def _source_layout(self, name: str, config: ModelConfig) -> EntityLayout | None:
        """Weights that come without a config are taken for cells of a square grid, as the published ones are."""
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
        """Of one parameter, whole, in float32 on the CPU; none where there is no such thing."""
        if name in self.resized:
            return resize_positions(self.source.whole(f"{self.kind}/{name}"), self.resized[name], self.layout)
        return self.source.whole(f"{self.kind}/{name}") if name in self.matching else None

    def report(self) -> Iterator[str]:
        """What was taken and what was not, a line each."""
        fits = self.fits
        what = "averages" if self.kind == "ema" else "weights"
        yield (
            f"initialised from the {what} of {self.source.path} ({self.source.format}): {len(fits)} of {len(self.shapes)} "
            f"parameters, {self._elements(fits):,} of {self._elements(self.shapes):,} elements"
        )
        for name, before in self.resized.items():
            done = "reordered" if before.grids == self.layout.grids else "resized"
            yield f"  {done}: {name}: {_described(before)} there, {_described(self.layout)} here"
        for name in self.shapes:
            if name not in fits:
                yield f"  begins anew: {self._missing(name)}"
        if unused := sorted(set(self.source_shapes) - set(self.shapes)):
            yield f"  not used: {len(unused)}, first {unused[0]}"


def resize_positions(positions_TD: Tensor, before: EntityLayout, after: EntityLayout) -> Tensor:
    """Learned positions (T, D) of one layout as those of another, whose grid may be finer or its entities others.

    A grid of the pyramid that both have keeps its own; others are interpolated (bicubic) from the finest one.
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
