"""EntityLayout: which tokens form an entity, in which order, and where each token lies. Nothing else knows the kind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from xar_scale.config import ModelConfig
from xar_scale.errors import ConfigError


class _Indices(NamedTuple):
    """The layout's index tensors on one device."""

    order: Tensor  # (T,) raster index of each token
    inverse: Tensor  # (T,) token of each raster index
    entity: Tensor  # (T,) entity of each token


@dataclass(frozen=True, eq=False)
class EntityLayout:
    """The sequence of one kind of entity on one grid.

    Tokens are entity-major: first all of entity 0, then all of entity 1. ``order[i]`` is the raster index (row-major) of
    token i; ``lengths[k]`` the number of tokens of entity k.
    """

    grid: tuple[int, int]
    lengths: tuple[int, ...]
    order: Tensor  # (T,) int64
    _indices: dict[torch.device, _Indices] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    @property
    def entities(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """K + 1 positions: entity k is tokens offsets[k] to offsets[k + 1]."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def coordinates(self) -> Tensor:
        """(T, 2) float32: row and column of each token on the grid."""
        columns = self.grid[1]
        return torch.stack([self.order // columns, self.order % columns], dim=-1).float()

    def on(self, device: torch.device) -> _Indices:
        """The index tensors on ``device``, copied there once: a copy each step would stall it."""
        if device not in self._indices:
            entity = torch.repeat_interleave(torch.arange(self.entities), torch.tensor(self.lengths))
            tensors = (self.order, torch.argsort(self.order), entity)
            self._indices[device] = _Indices(*(tensor.to(device) for tensor in tensors))
        return self._indices[device]

    def to_entities(self, latents_BCHW: Tensor) -> Tensor:
        """Latents (B, C, rows, columns) -> tokens (B, T, C), entity-major."""
        return latents_BCHW.flatten(2).transpose(1, 2)[:, self.on(latents_BCHW.device).order]

    def from_entities(self, tokens_BTC: Tensor) -> Tensor:
        """Tokens (B, T, C), entity-major -> latents (B, C, rows, columns)."""
        return tokens_BTC[:, self.on(tokens_BTC.device).inverse].transpose(1, 2).unflatten(2, self.grid)

    def expand(self, values_BK: Tensor) -> Tensor:
        """One value an entity -> one a token: (B, K) -> (B, T)."""
        return values_BK[:, self.on(values_BK.device).entity]


def create_layout(config: ModelConfig) -> EntityLayout:
    """The layout that ``config`` names. Raises ConfigError with the sizes that would divide."""
    return _KINDS[config.entity](config.grid, config.entity_size)


def _cell(grid: tuple[int, int], side: int) -> EntityLayout:
    """Square cells of side x side neighbouring tokens, cells and their tokens row-major (the published model: side 8)."""
    rows, columns = grid
    if rows % side or columns % side:
        fits = [n for n in range(1, min(grid) + 1) if rows % n == 0 and columns % n == 0]
        raise ConfigError(f"cells of {side}x{side} tokens do not tile a {rows}x{columns} grid; sides that do: {fits}")
    raster = torch.arange(rows * columns).view(rows // side, side, columns // side, side)
    order = raster.permute(0, 2, 1, 3).reshape(-1)
    cells = (rows // side) * (columns // side)
    return EntityLayout(grid=grid, lengths=(side * side,) * cells, order=order)


_KINDS: dict[str, Callable[[tuple[int, int], int], EntityLayout]] = {"cell": _cell}
