"""EntityLayout: the order of tokens, and the round trip."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TINY
from tests.unit.conftest import unequal_layout
from xar_scale.config import ModelConfig
from xar_scale.errors import ConfigError
from xar_scale.model.entities import create_layout, kinds


def layout_of(kind: str, rows: int, columns: int, size: int | None = None):
    sizes = {"entity": kind, "grid": (rows, columns), "entity_size": size}
    return create_layout(ModelConfig(width=8, depth_encoder=1, depth_decoder=1, heads=1, **sizes))


def cells(rows: int, columns: int, side: int):
    return layout_of("cell", rows, columns, side)


def places(layout) -> list[list[tuple[float, float]]]:
    """(row, column) of the tokens of each entity."""
    coordinates = [tuple(place) for place in layout.coordinates.tolist()]
    return [coordinates[begin:end] for begin, end in pairwise(layout.offsets)]


@settings(deadline=None, max_examples=50)
@given(
    side=st.integers(1, 4),
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
)
def test_the_round_trip_is_exact(side, down, across, batch, channels):
    layout = cells(side * down, side * across, side)
    latents = torch.randn(batch, channels, side * down, side * across)
    tokens = layout.to_entities(latents)
    assert tokens.shape == (batch, layout.tokens, channels)
    assert torch.equal(layout.from_entities(tokens), latents)
    assert torch.equal(layout.to_entities(layout.from_entities(tokens)), tokens)
    assert layout.lengths == (side * side,) * (down * across) and layout.entities == down * across
    assert layout.tokens == side * side * down * across


def published_order() -> list[tuple[int, int]]:
    """(row, column) of the published model's tokens: 8x8 cells of a 16x16 grid, cells and tokens row by row."""
    places = []
    for cell_row in (0, 8):
        for cell_column in (0, 8):
            for row in range(8):
                for column in range(8):
                    places.append((cell_row + row, cell_column + column))
    return places


def test_cells_of_the_published_model_come_row_by_row():
    layout = create_layout(TINY)
    assert layout.order.tolist() == [16 * row + column for row, column in published_order()]
    latents = torch.arange(256).view(1, 1, 16, 16)
    assert layout.to_entities(latents).flatten().tolist() == layout.order.tolist()


def test_coordinates_are_row_and_column_of_each_token():
    assert create_layout(TINY).coordinates.tolist() == [list(place) for place in published_order()]
    layout = cells(2, 6, 2)  # not square
    assert layout.coordinates.tolist()[4:8] == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert layout.coordinates.dtype == torch.float32


def test_expand_gives_each_token_the_value_of_its_entity():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    expanded = [[1, 2, 2, 2, 3, 3, 4, 4, 4, 4], [5, 6, 6, 6, 7, 7, 8, 8, 8, 8]]
    assert unequal_layout().expand(values).tolist() == expanded


def test_entities_of_unequal_length_round_trip():
    layout = unequal_layout()
    latents = torch.randn(2, 3, 2, 5)
    assert layout.offsets == (0, 1, 4, 6, 10)
    assert torch.equal(layout.from_entities(layout.to_entities(latents)), latents)


def test_the_index_tensors_are_copied_to_a_device_once():
    layout = create_layout(TINY)
    assert layout.on(torch.device("cpu")) is layout.on(torch.device("cpu"))


@pytest.mark.parametrize(
    ("grid", "side", "fits"), [((16, 16), 3, "[1, 2, 4, 8, 16]"), ((6, 9), 2, "[1, 3]"), ((4, 8), 8, "[1, 2, 4]")]
)
def test_cells_that_do_not_tile_the_grid_are_refused_with_the_sides_that_do(grid, side, fits):
    with pytest.raises(ConfigError) as caught:
        cells(*grid, side)
    text = f"cells of {side}x{side} tokens do not tile a {grid[0]}x{grid[1]} grid; sizes that do: {fits}"
    assert str(caught.value) == text


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(kinds()), down=st.integers(1, 4), across=st.integers(1, 4), channels=st.integers(1, 3))
def test_every_kind_round_trips_exactly(kind, down, across, channels):
    layout = layout_of(kind, 4 * down, 4 * across)
    latents = torch.randn(2, channels, 4 * down, 4 * across)
    tokens = layout.to_entities(latents)
    assert tokens.shape == (2, layout.tokens, channels) and layout.tokens == sum(layout.lengths)
    assert torch.equal(layout.from_entities(tokens), latents)


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (4, 4), (1, 5)])
def test_a_patch_is_one_token_row_by_row(rows, columns):
    everywhere = [(row, column) for row in range(rows) for column in range(columns)]
    assert places(layout_of("patch", rows, columns)) == [[place] for place in everywhere]
    assert places(layout_of("image", rows, columns)) == [everywhere]


@pytest.mark.parametrize(("rows", "columns", "stride"), [(4, 4, 2), (6, 9, 3), (2, 8, 2), (3, 4, 1)])
def test_a_subsample_is_every_nth_token_in_both_directions(rows, columns, stride):
    expected = [
        [(row, column) for row in range(a, rows, stride) for column in range(b, columns, stride)]
        for a in range(stride)
        for b in range(stride)
    ]
    assert places(layout_of("subsample", rows, columns, stride)) == expected


def test_scales_are_averages_from_coarse_to_fine():
    layout = layout_of("scale", 8, 12)
    assert layout.grids == ((2, 3), (4, 6), (8, 12)) and layout.lengths == (6, 24, 96)
    latents = torch.randn(2, 3, 8, 12)
    for grid, tokens in zip(layout.grids, layout.to_entities(latents).split(layout.lengths, dim=1), strict=True):
        factor = 8 // grid[0]
        expected = F.avg_pool2d(latents, factor).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, expected)
    assert places(layout)[1][:2] == [(0.5, 0.5), (0.5, 2.5)]  # the centre of 2x2 tokens of the full grid
    assert places(layout)[2][:2] == [(0, 0), (0, 1)]
    assert layout_of("scale", 8, 12, 2).grids == ((4, 6), (8, 12))
    assert layout_of("scale", 16, 16).grids == ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16))
    assert layout_of("scale", 5, 8).grids == ((5, 8),)


def test_default_sizes_are_the_published_ones():
    assert layout_of("cell", 16, 16).lengths == (64,) * 4
    assert layout_of("cell", 32, 32).lengths == (256,) * 4
    assert layout_of("subsample", 16, 16).lengths == (64,) * 4
    assert layout_of("patch", 32, 32).entities == 1024


@pytest.mark.parametrize(
    ("kind", "size", "complaint"),
    [
        ("subsample", 3, "subsamples of stride 3 do not tile a 16x16 grid; sizes that do: [1, 2, 4, 8, 16]"),
        ("scale", 6, "6 scales do not fit a 16x16 grid, which halves evenly to at most 5"),
        ("patch", 2, "model.entity_size is 2, but entities of kind patch have no size"),
        ("image", 2, "model.entity_size is 2, but entities of kind image have no size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind, size, complaint):
    with pytest.raises(ConfigError) as caught:
        layout_of(kind, 16, 16, size)
    assert str(caught.value) == complaint
