"""Quality of samples against the cost of drawing them, for every sampler, on a trained run of the digits.

python tools/compare_samplers.py runs/demo --out runs/samplers
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from xar_scale import dist
from xar_scale.checkpoint.manifest import Checkpoint
from xar_scale.cli import Parser, ending
from xar_scale.config import Config
from xar_scale.errors import UsageError
from xar_scale.evaluate.digits import CLASSES, frechet_distance, judge
from xar_scale.evaluate.generate import draw_grid, generate, open_checkpoint
from xar_scale.files import write_atomically
from xar_scale.sampler import SAMPLERS

EXACT = dict(sampler="heun", steps=100)  # what the deterministic samplers converge to


def main() -> int:
    parser = Parser(prog="compare_samplers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of the digits")
    parser.add_argument("--out", type=Path, required=True, help="folder of table.md and samplers.png")
    parser.add_argument("--steps", default="3,5,10,25,50", help="numbers of steps, with commas")
    parser.add_argument("--per-class", type=int, default=50)

    def run() -> None:
        options = parser.parse_args()
        try:
            steps = [int(number) for number in options.steps.split(",")]
        except ValueError:
            raise UsageError(f"--steps {options.steps!r} is not numbers with commas") from None
        if min(*steps, options.per_class) < 1:
            raise UsageError("--steps and --per-class are at least 1")
        compare(open_checkpoint(options.run), options.out, steps, options.per_class)

    return ending("compare_samplers", run)


def compare(checkpoint: Checkpoint, out: Path, steps: list[int], per_class: int) -> None:
    config = Config.from_dict(checkpoint.manifest.config)
    labels = list(range(CLASSES)) * per_class

    def draw(**changes: Any) -> np.ndarray:
        settings = dataclasses.replace(config.sample, **changes)
        return generate(checkpoint, labels, settings, 0, dist.local_device(), config.kernels)

    exact = draw(**EXACT).astype(np.float64)
    lines = [
        "| sampler | steps | velocities an entity | read as their class | Frechet distance | grey levels from exact |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows: dict[str, np.ndarray] = {}
    for sampler in SAMPLERS:
        for count in steps:
            images = draw(sampler=sampler, steps=count)
            off = "" if sampler == "euler_maruyama" else f"{np.sqrt(np.mean((images - exact) ** 2)):.1f}"
            lines.append(
                f"| {sampler} | {count} | {2 * count - 1 if sampler == 'heun' else count} | "
                f"{judge(images, np.array(labels)).samples:.1%} | {frechet_distance(images):.2f} | {off} |"
            )
            print(lines[-1], flush=True)
            rows[f"{sampler} {count}"] = images[:CLASSES]
    out.mkdir(parents=True, exist_ok=True)
    draw_grid(rows, out / "samplers.png")
    write_atomically(out / "table.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
