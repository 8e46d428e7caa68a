"""EntityLayout: which tokens form an entity, in which order, and each token's position. No other code knows the kind.

The kinds are those of xAR (Ren et al., 2025), section 3.1 and figure 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xar_scale.config import ModelConfig
from xar_scale.errors import ConfigError

Grid = tuple[int, int]


class _Indices(NamedTuple):
    """The layout's index tensors on one device."""

    order: Tensor  # (T,) raster index of each token
    inverse: Tensor  # (rows * columns,) token of each raster index of the full grid
    entity: Tensor  # (T,) entity of each token
    ends: Tensor  # (T,) int32: for each token the first one that it does not attend to
    coordinates: Tensor  # (T, 2) float32


@dataclass(frozen=True, eq=False)
class EntityLayout:
    """The token sequence of one kind of entity on one grid.

    Tokens are entity-major: first all of entity 0, then all of entity 1. They come from a pyramid of ``grids``, the full grid
    last; all kinds but ``scale`` have that one only. ``order[i]`` is the raster index (row-major, grid after grid) of token i,
    and ``lengths[k]`` the number of tokens of entity k.
    """

    grids: tuple[Grid, ...]
    lengths: tuple[int, ...]
    order: Tensor  # (T,) int64
    _indices: dict[torch.device, _Indices] = field(default_factory=dict, repr=False)

    @property
    def grid(self) -> Grid:
        """Rows and columns of the latents."""
        return self.grids[-1]

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    @property
    def entities(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """K + 1 positions: entity k is the tokens from offsets[k] up to, not including, offsets[k + 1]."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def coordinates(self) -> Tensor:
        """(T, 2) float32: row and column of each token on the full grid; for a coarser grid's token, those of its centre."""
        rows, columns = self.grid
        places = [
            torch.cartesian_prod(
                (_numbers(r) + 0.5) * (rows / r) - 0.5,
                (_numbers(c) + 0.5) * (columns / c) - 0.5,
            )
            for r, c in self.grids
        ]
        return torch.cat(places)[self.order]

    def on(self, device: torch.device) -> _Indices:
        """Return the index tensors on ``device``, copied there once: a copy in each step would stall it."""
        if device not in self._indices:
            entity = torch.repeat_interleave(_numbers(self.entities), torch.tensor(self.lengths, device="cpu"))
            inverse = torch.argsort(self.order)[-self.grid[0] * self.grid[1] :]
            ends = torch.tensor(self.offsets[1:], dtype=torch.int32, device="cpu")[entity]
            tensors = (self.order, inverse, entity, ends, self.coordinates)
            self._indices[device] = _Indices(*(tensor.to(device) for tensor in tensors))
        return self._indices[device]

    def to_entities(self, latents_BCHW: Tensor) -> Tensor:
        """Latents (B, C, rows, columns) -> tokens (B, T, C), entity-major. Coarser grids hold averages of their cells."""
        pyramid = [F.adaptive_avg_pool2d(latents_BCHW, grid) for grid in self.grids[:-1]]
        raster = torch.cat([level.flatten(2) for level in [*pyramid, latents_BCHW]], dim=2).transpose(1, 2)
        return raster[:, self.on(latents_BCHW.device).order]

    def from_entities(self, tokens_BTC: Tensor) -> Tensor:
        """Tokens (B, T, C), entity-major -> latents (B, C, rows, columns): those of the full grid."""
        return tokens_BTC[:, self.on(tokens_BTC.device).inverse].transpose(1, 2).unflatten(2, self.grid)

    def expand(self, values_BK: Tensor) -> Tensor:
        """One value an entity -> one a token: (B, K) -> (B, T)."""
        return values_BK[:, self.on(values_BK.device).entity]


def create_layout(config: ModelConfig) -> EntityLayout:
    """Return the layout that ``config`` names. Raises ConfigError, naming the sizes that fit, if the grid cannot be tiled."""
    return _KINDS[config.entity](config.grid, config.entity_size)


def _patch(grid: Grid, size: int | None) -> EntityLayout:
    """Each token is an entity, row by row."""
    _no_size("patch", size)
    tokens = grid[0] * grid[1]
    return EntityLayout((grid,), (1,) * tokens, _numbers(tokens))


def _cell(grid: Grid, side: int | None) -> EntityLayout:
    """Square cells of side x side neighbouring tokens, cells and their tokens row-major (the published model: side 8)."""
    at_most_half = [side for side in _divisors(grid) if side <= max(1, min(grid) // 2)]
    side = _divisor("cells of {0}x{0} tokens", grid, side, default=at_most_half[-1])
    return _grouped(grid, _raster(grid).unflatten(0, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 1, 3))


def _subsample(grid: Grid, stride: int | None) -> EntityLayout:
    """Entity (a, b) is every stride-th token from row a and column b on: spread over the image, not neighbours."""
    stride = _divisor("subsamples of stride {0}", grid, stride, default=2)
    return _grouped(grid, _raster(grid).unflatten(0, (-1, stride)).unflatten(2, (-1, stride)).permute(1, 3, 0, 2))


def _scale(grid: Grid, scales: int | None) -> EntityLayout:
    """Coarse to fine: each entity is the whole latent, averaged to a grid half as fine as the next; the last is itself."""
    grids = [grid]
    while grids[0][0] % 2 == 0 and grids[0][1] % 2 == 0:
        grids.insert(0, (grids[0][0] // 2, grids[0][1] // 2))
    if scales is not None and scales > len(grids):
        raise ConfigError(f"{scales} scales do not fit a {grid[0]}x{grid[1]} grid, which halves evenly to at most {len(grids)}")
    grids = grids[-scales:] if scales else grids
    lengths = tuple(rows * columns for rows, columns in grids)
    return EntityLayout(tuple(grids), lengths, _numbers(sum(lengths)))


def _image(grid: Grid, size: int | None) -> EntityLayout:
    """One entity: plain flow matching."""
    _no_size("image", size)
    tokens = grid[0] * grid[1]
    return EntityLayout((grid,), (tokens,), _numbers(tokens))


_KINDS: dict[str, Callable[[Grid, int | None], EntityLayout]] = {
    "patch": _patch,
    "cell": _cell,
    "subsample": _subsample,
    "scale": _scale,
    "image": _image,
}


def _numbers(count: int) -> Tensor:
    """Return 0, 1, 2, ... on the CPU, even while a model is built on the meta device: a layout has no parameters to defer."""
    return torch.arange(count, device="cpu")


def _raster(grid: Grid) -> Tensor:
    return _numbers(grid[0] * grid[1]).view(grid)


def _grouped(grid: Grid, groups: Tensor) -> EntityLayout:
    """Return entities of equal length, from raster indices (entity row, entity column, row in it, column in it)."""
    groups = groups.flatten(2).flatten(0, 1)
    return EntityLayout((grid,), (groups.shape[1],) * groups.shape[0], groups.reshape(-1))


def _divisor(what: str, grid: Grid, size: int | None, default: int) -> int:
    size = default if size is None else size
    if grid[0] % size or grid[1] % size:
        raise ConfigError(f"{what.format(size)} do not tile a {grid[0]}x{grid[1]} grid; sizes that do: {_divisors(grid)}")
    return size


def _divisors(grid: Grid) -> list[int]:
    return [n for n in range(1, min(grid) + 1) if grid[0] % n == 0 and grid[1] % n == 0]


def _no_size(kind: str, size: int | None) -> None:
    if size is not None:
        raise ConfigError(f"model.entity_size is {size}, but entities of kind {kind} have no size")


def kinds() -> Sequence[str]:
    """Return the names of all kinds of entity."""
    return list(_KINDS)
