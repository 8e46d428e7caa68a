"""Draw the order of every kind of entity on a small grid: one square per token, with the number and colour of its entity.

python tools/draw_entities.py --out docs/images/entities.png
"""

import colorsys
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from xar_scale.config import ModelConfig
from xar_scale.errors import ConfigError, UsageError
from xar_scale.evaluate.output import png_bytes
from xar_scale.files import write_atomically
from xar_scale.model.entities import EntityLayout, create_layout, kinds
from xar_scale.program import tool_parser
from xar_scale.validation import validated

SIDE, GAP, TITLE = 22, 14, 24  # pixels: side of a token, gap between grids, height of a title


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--grid", type=int, default=8, help="tokens per side")
    return parser.run(lambda options: draw(options.out, options.grid))


def draw(out: Path, side: int) -> None:
    if out.suffix != ".png" or out.is_dir():
        raise UsageError(f"--out {out} must be a .png file")
    sizes = {"width": 8, "depth_encoder": 1, "depth_decoder": 1, "heads": 1, "grid": [side] * 2}
    configs = {kind: validated(ModelConfig, {**sizes, "entity": kind}, ConfigError) for kind in kinds()}
    sheet = _sheet({kind: create_layout(config) for kind, config in configs.items()})
    write_atomically(out, png_bytes(sheet.quantize(64), optimize=True))


def _sheet(layouts: dict[str, EntityLayout]) -> Image.Image:
    """Draw one row per kind: the grids that its tokens are taken from, coarsest first."""
    rows = {kind: TITLE + GAP + layout.grid[0] * SIDE for kind, layout in layouts.items()}
    width = max(sum(columns * SIDE + GAP for _, columns in layout.grids) for layout in layouts.values()) + GAP
    sheet = Image.new("RGB", (width, sum(rows.values()) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for kind, layout in layouts.items():
        lengths = sorted({min(layout.lengths), max(layout.lengths)})
        title = f"{kind}: K = {layout.entities}, of {' to '.join(map(str, lengths))} tokens"
        pen.text((GAP, top + TITLE // 2), title, fill="black", font=ImageFont.load_default(size=14), anchor="lm")
        _draw_grids(pen, layout, top + TITLE)
        top += rows[kind]
    return sheet


def _draw_grids(pen: ImageDraw.ImageDraw, layout: EntityLayout, top: int) -> None:
    entity_of = torch.empty(layout.tokens, dtype=torch.int64)
    entity_of[layout.order] = layout.on(torch.device("cpu")).entity  # by position in the pyramid
    left, place = GAP, 0
    for rows, columns in layout.grids:
        for cell in range(rows * columns):
            entity = int(entity_of[place])
            x, y = left + cell % columns * SIDE, top + cell // columns * SIDE
            hue = 0.75 * entity / max(1, layout.entities - 1)
            colour = tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.35, 1.0))
            pen.rectangle((x, y, x + SIDE - 2, y + SIDE - 2), fill=colour)
            pen.text((x + SIDE // 2 - 1, y + SIDE // 2 - 1), str(entity), fill="black", font=_FONT, anchor="mm")
            place += 1
        left += columns * SIDE + GAP


_FONT = ImageFont.load_default(size=10)

if __name__ == "__main__":
    sys.exit(main())
