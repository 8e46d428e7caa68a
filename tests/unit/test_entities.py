"""EntityLayout: the order of tokens, and there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import TINY
from tests.unit.conftest import unequal_layout
from xar_scale.config import ModelConfig
from xar_scale.errors import ConfigError
from xar_scale.model.entities import create_layout


def cells(rows: int, columns: int, side: int):
    return create_layout(
        ModelConfig(width=8, depth_encoder=1, depth_decoder=1, heads=1, grid=(rows, columns), entity_size=side)
    )


@settings(deadline=None, max_examples=50)
@given(
    side=st.integers(1, 4),
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
)
def test_there_and_back_is_exact(side, down, across, batch, channels):
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


def test_entities_of_unequal_length_go_there_and_back():
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
    text = f"cells of {side}x{side} tokens do not tile a {grid[0]}x{grid[1]} grid; sides that do: {fits}"
    assert str(caught.value) == text
