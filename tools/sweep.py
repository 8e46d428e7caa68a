"""Compare image quality with sampling cost over samplers, steps and guidance: a table, a plot and an image.

python tools/sweep.py runs/demo --out runs/sweep --reference digits --sampler euler,heun --steps 5,10,25 --guidance 1,1.5,2
torchrun --nproc-per-node 8 tools/sweep.py xAR-B.pth --out runs/sweep --reference adm_in256_stats.npz --guidance 2.3,2.7,3.1
"""

import argparse
import functools
import io
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xar_scale import dist
from xar_scale.errors import UsageError
from xar_scale.evaluate.evaluation import Comparison, check_folder, describe, image_set, read_result, write
from xar_scale.evaluate.fidelity import INCEPTION
from xar_scale.evaluate.generate import Generator, open_generator
from xar_scale.evaluate.imageset import ImageSet
from xar_scale.evaluate.output import draw_grid, png_bytes
from xar_scale.evaluate.trained import TrainedModel, open_trained
from xar_scale.files import write_atomically
from xar_scale.model.entities import create_layout
from xar_scale.program import exit_code_of, tool_parser
from xar_scale.sampler import SAMPLERS

SEED = 0
ROW, SHOWN = "row.npy", 10  # the first images of a set, for samples.png
LINES = ("-", "--", ":", "-.")  # line styles of the plot, by guidance; colours are by sampler

Result = dict[str, Any]  # contents of a set's evaluation.json


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("weights", type=Path, help="a run, a checkpoint, or a file of published weights")
    parser.add_argument("--out", type=Path, required=True, help="folder for sweep.md, .json, .svg, samples.png and the sets")
    parser.add_argument("--reference", required=True, help="digits, an npz with mu and sigma or images, or a folder of images")
    parser.add_argument("--images", type=int, default=1000, help="images per set (default: 1000)")
    parser.add_argument("--sampler", type=_samplers, help=f"comma-separated, from {', '.join(SAMPLERS)} (default: the run's)")
    parser.add_argument("--steps", type=functools.partial(_numbers, int, 1), help="comma-separated (default: the run's)")
    parser.add_argument("--guidance", type=functools.partial(_numbers, float, 0), help="comma-separated (default: the run's)")
    parser.add_argument("--features", default=INCEPTION, help="one of torch-fidelity's extractors")
    parser.add_argument("--inception-weights", type=Path, help="path of Inception's weights (default: torch-fidelity's copy)")
    parser.add_argument("overrides", nargs="*", help="sample.key=value and kernels.key=value, for all sets")
    return exit_code_of(parser.prog, lambda: sweep(parser.parse_intermixed_args()))


def _samplers(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in SAMPLERS]:
        raise argparse.ArgumentTypeError(f"no sampler {unknown[0]!r}; available: {', '.join(SAMPLERS)}")
    return list(dict.fromkeys(text.split(",")))


def _numbers(kind: type[int] | type[float], least: int, text: str) -> list[float]:
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers of at least {least}")
    return list(dict.fromkeys(numbers))


def sweep(options: argparse.Namespace) -> None:
    """Evaluate every combination. Existing results are kept, so an interrupted sweep resumes. Every rank calls this."""
    if options.images < 2:
        raise UsageError("--images is at least 2")
    device = dist.local_device()
    if dist.world() > 1:
        dist.init(device)
    dist.on_all_ranks(_matplotlib)  # fail now: it is needed last, after hours
    trained = open_trained(options.weights, options.overrides)
    comparison = Comparison(options.reference, options.features, device, options.inception_weights)
    generator = functools.cache(lambda: open_generator(trained, device))  # once, and only if a set is missing
    own = trained.sample
    lists = (options.sampler or [own.sampler], options.guidance or [own.guidance], options.steps or [own.steps])
    results: dict[str, Result] = {}
    for sampler, guidance, steps in itertools.product(*lists):
        setting = replace(trained, sample=replace(own, sampler=sampler, guidance=guidance, steps=steps))
        name = f"{sampler}-{steps}-{guidance:g}"
        images = image_set(setting, options.out / name, options.images, SEED)
        results[name] = evaluate(images, setting, comparison, generator)
    dist.on_rank_0(lambda: publish(options.out, results))


def evaluate(images: ImageSet, trained: TrainedModel, comparison: Comparison, generator: Callable[[], Generator]) -> Result:
    """Return the results of a set, generating it if they do not exist. Images are deleted: a sweep's would fill a disk."""
    result = dist.on_rank_0(lambda: _read(images, comparison))
    if result is None:
        dist.on_rank_0(images.open)
        dist.on_rank_0(lambda: check_folder(images.folder, describe(images, trained) | comparison.description))
        missing = len(dist.on_rank_0(images.missing))
        cost: dict[str, float] = {"passes": passes(trained)}
        if missing:
            drawing = generator().with_settings(trained.sample)
            begun = time.perf_counter()
            images.draw(drawing)
            if missing == images.parts:  # else the time covers only some of them
                cost["images_per_s"] = images.count / (time.perf_counter() - begun)
        result = comparison.evaluate(images, images.labels, describe(images, trained) | {"cost": cost})
    return dist.on_rank_0(lambda: _keep(images, result))


def passes(trained: TrainedModel) -> int:
    """Return forward passes of the network per image; with guidance above 1 each step counts twice, conditional and not.

    An upper bound: unless the schedule is constant, the first entity's scale is 1, and a guidance interval also costs less.
    """
    sample = trained.sample
    velocities = SAMPLERS[sample.sampler].velocities(sample.steps)
    return create_layout(trained.model).entities * velocities * (2 if sample.guidance > 1 else 1)


def _read(images: ImageSet, comparison: Comparison) -> Result | None:
    """Return the stored result if it is for exactly these images and this comparison, else None. Raises DataError."""
    there = read_result(images.folder)
    if "cost" not in there:  # not written by a sweep
        return None
    drawn = {**there["set"], "weights": there["weights"]["sha256"]}
    known = images.description.items() <= drawn.items()
    return there if known and comparison.description.items() <= there.items() else None


def _keep(images: ImageSet, result: Result) -> Result:
    """Store the result and the first images in the folder, and delete the parts."""
    if images.path(0).is_file():
        np.save(images.folder / ROW, images.read(0)[:SHOWN])
    write(images.folder, result)
    for part in range(images.parts):
        images.path(part).unlink(missing_ok=True)
    return result


def publish(out: Path, results: dict[str, Result]) -> None:
    write_atomically(out / "sweep.json", json.dumps(results, indent=1).encode())
    write_atomically(out / "sweep.md", f"{table([*results.values()])}\n".encode())
    write_atomically(out / "sweep.svg", plot([*results.values()]))
    rows = {name: np.load(out / name / ROW) for name in results}
    write_atomically(out / "samples.png", png_bytes(draw_grid(rows)))
    print(table([*results.values()]))


def table(results: list[Result]) -> str:
    """Return a Markdown table, with the best value of the first metric in bold."""
    first, *others = [name for name in results[0]["metrics"] if not name.startswith("held_out_")]
    lines = [
        f"| sampler | steps | guidance | passes per image | images/s | {' | '.join([first, *others])} |",
        f"|{' --- |' * (6 + len(others))}",
    ]
    best = min(result["metrics"][first] for result in results)
    for result in results:
        sample, cost, metrics = result["set"]["sample"], result["cost"], result["metrics"]
        rate = f"{cost['images_per_s']:.1f}" if "images_per_s" in cost else ""
        quality = f"**{best:.4g}**" if metrics[first] == best else f"{metrics[first]:.4g}"
        words = [sample["sampler"], sample["steps"], f"{sample['guidance']:g}", cost["passes"], rate, quality]
        lines.append(f"| {' | '.join(map(str, [*words, *(f'{metrics[name]:.4g}' for name in others)]))} |")
    return "\n".join(lines)


def plot(results: list[Result]) -> bytes:
    """Return an SVG of the first metric against passes, one line per sampler and guidance."""
    first = next(iter(results[0]["metrics"]))
    curves: dict[tuple[str, float], list[tuple[int, float]]] = {}
    for result in results:
        sample = result["set"]["sample"]
        points = curves.setdefault((sample["sampler"], sample["guidance"]), [])
        points.append((result["cost"]["passes"], result["metrics"][first]))
    figure = _matplotlib().figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    guidances = list(dict.fromkeys(guidance for _, guidance in curves))
    for (sampler, guidance), points in curves.items():
        colour, line = f"C{[*SAMPLERS].index(sampler)}", LINES[guidances.index(guidance) % len(LINES)]
        axes.plot(*zip(*sorted(points), strict=True), line, marker="o", color=colour, label=f"{sampler}, guidance {guidance:g}")
    axes.set(xlabel="forward passes per image", ylabel=first.replace("_", " "))
    for scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        scale("log", subs=(2, 3, 5))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    figure.legend(loc="outside right upper", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError:
        raise UsageError("the plot needs matplotlib: pip install 'xar_scale[evaluate]'") from None
    return matplotlib


if __name__ == "__main__":
    dist.run(main)
