"""Train the digits recipe with every kind of entity and the same budget; write a table and an image with one row per kind.

python tools/compare_entities.py --out runs/entities
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from xar_scale import dist
from xar_scale.config import Config, merge, override
from xar_scale.data.shards import DATASET_FILE
from xar_scale.evaluate.digits import CLASSES, cache_digits, digit_classifier
from xar_scale.evaluate.generate import open_generator
from xar_scale.evaluate.output import draw_grid, png_bytes
from xar_scale.evaluate.trained import open_trained
from xar_scale.files import write_atomically
from xar_scale.metrics import METRICS_FILE
from xar_scale.model.entities import create_layout, kinds
from xar_scale.presets import recipe
from xar_scale.program import tool_parser
from xar_scale.train import train

PER_CLASS = 50
LAST_LOGS = 5  # logged steps that the loss is averaged over


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, table.md and entities.png")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all kinds")
    return parser.run(lambda options: compare(options.out, options.overrides))


def compare(out: Path, overrides: list[str]) -> None:
    """Train, sample and compare all kinds. Finished runs in ``out`` are kept, so an interrupted comparison resumes."""
    data = out / "data"
    if not (data / DATASET_FILE).exists():
        cache_digits(data, samples_per_shard=256)
    lines = [
        "| entity | K | T | loss | read as their class | images/s sampling | sampler, steps |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows: dict[str, np.ndarray] = {}
    for kind in kinds():
        own = {"model": {"entity": kind}, "data": {"path": str(data)}, "train": {"engine": "single"}}
        config = Config.from_dict(override(merge(recipe("digits"), own), overrides))
        print(f"== {kind}", flush=True)
        train(config, out / kind)
        generator = open_generator(open_trained(out / kind, []), dist.local_device())
        labels = list(range(CLASSES)) * PER_CLASS
        begun = time.perf_counter()
        images = generator.draw(labels)
        seconds = time.perf_counter() - begun
        layout = create_layout(config.model)
        logs = (out / kind / METRICS_FILE).read_text().splitlines()[-LAST_LOGS:]
        loss = np.mean([json.loads(line)["loss"] for line in logs])
        read = digit_classifier().accuracy(images, np.array(labels))
        lines.append(
            f"| {kind} | {layout.entities} | {layout.tokens} | {loss:.3f} | {read:.1%} | "
            f"{len(labels) / seconds:.0f} | {config.sample.sampler}, {config.sample.steps} |"
        )
        rows[kind] = images[:CLASSES]
    write_atomically(out / "entities.png", png_bytes(draw_grid(rows)))
    table = "\n".join(lines)
    write_atomically(out / "table.md", f"{table}\n".encode())
    print(table)


if __name__ == "__main__":
    sys.exit(main())
