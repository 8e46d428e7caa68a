"""The command line: xar-scale train | sample | evaluate | plan | report | replay | doctor."""

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from xar_scale.config import Config, merge, override, read_yaml
from xar_scale.errors import UsageError
from xar_scale.files import make_folder, write_atomically
from xar_scale.plan.hardware import GPUS
from xar_scale.presets import MODELS, RECIPES, model_values, recipe
from xar_scale.program import Parser, exit_code_of, nonempty
from xar_scale.stopping import StopRequests
from xar_scale.tables import aligned


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. A deliberate exit prints one line on standard error and returns a documented exit code."""

    def run() -> None:
        options = _parse(arguments)
        options.run_command(options)

    return exit_code_of("xar-scale", run)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse options in any order, with ``section.key=value`` overrides anywhere among them, which argparse cannot express."""
    parser, words = _parser(), list(sys.argv[1:] if arguments is None else arguments)
    overrides = [word for word in words if re.match(r"[a-z_]+\.[a-z_.]+=", word)]  # at any position
    options, rest = parser.parse_known_args([word for word in words if word not in overrides])
    overrides += [word for word in rest if "=" in word and not word.startswith("-")]  # malformed: refused later
    options.overrides = overrides if options.overridable else []
    if unknown := [word for word in (*rest, *overrides) if word not in options.overrides]:
        parser.error(f"unknown argument {unknown[0]}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="xar-scale",
        description="Train, sample and check xAR and larger next-X image models.",
        epilog="exit codes: 0 done, 64 usage, 65 bad data, 69 a hang, 70 non-finite, 71 a process died, 74 files, "
        "75 preempted, 76 stopped on request, 78 config",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by DeepSpeed's launcher; the environment has it too
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model, under a launcher or in one process",
        epilog="section.key=value arguments override everything else, e.g. optim.lr=1e-4",
    )
    train.add_argument("--recipe", help=f"base config: {', '.join(RECIPES)}")
    train.add_argument("--config", type=Path, help="a YAML file that overrides the recipe")
    train.add_argument("--run-dir", type=Path, help="folder for checkpoints, metrics and the config (default: runs/RECIPE)")
    train.add_argument(
        "--resume", type=nonempty, default="auto", help="auto (the newest valid checkpoint of the run), none, or a path"
    )
    train.add_argument(
        "--init-from", type=nonempty, help="a run, a checkpoint, a .pth or safetensors with the initial weights of a new run"
    )
    train.add_argument("--stop-after", metavar="TIME", help="30s, 90m, 3h50m, 2d: write a checkpoint and exit after this time")
    train.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and stop")
    train.set_defaults(run_command=_train, overridable=True)

    overriding = "sample.key=value and kernels.key=value arguments override the run's config, e.g. sample.guidance=1.5"
    sample = commands.add_parser("sample", help="draw images from a run, a checkpoint or published weights", epilog=overriding)
    sample.add_argument("weights", type=Path, help="folder of a run or of a checkpoint, or a published file")
    sample.add_argument("--classes", help='such as "golden retriever, 207, 1-5" (default: 0-9)')
    sample.add_argument("--seeds", default="0-9", help="one image per class and seed (default: 0-9)")
    sample.add_argument(
        "--out",
        type=Path,
        required=True,
        action="append",
        help="X.png: a labelled grid; X.npz: for ADM's evaluator; X.gif: the first image as it is generated; "
        "X/: one PNG per image. May be repeated",
    )
    sample.set_defaults(run_command=_sample, overridable=True)

    evaluate = commands.add_parser(
        "evaluate", help="draw a large set, on one rank or under a launcher, and compare it with real images", epilog=overriding
    )
    evaluate.add_argument("what", type=Path, help="as for sample; or images: an npz in ADM's format, a folder of images")
    evaluate.add_argument(
        "--reference", type=nonempty, required=True, help="digits, an npz with mu and sigma or with images, a folder of images"
    )
    evaluate.add_argument("--out", type=Path, help="folder for the set and its metrics (default: RUN/evaluations/STEP)")
    evaluate.add_argument("--images", type=int, help="number of images to generate (default: 50000)")
    evaluate.add_argument("--seed", type=int, help="seed of the generated images (default: 0)")
    evaluate.add_argument("--features", default="inception-v3-compat", help="one of torch-fidelity's extractors")
    evaluate.add_argument("--inception-weights", type=Path, help="path of torch-fidelity's file (default: its own cache)")
    evaluate.set_defaults(run_command=_evaluate, overridable=True)

    plan = commands.add_parser(
        "plan",
        help="estimate memory, time and cost of a run before it starts, and find the cheapest config that fits",
        epilog="section.key=value arguments override the recipe; what they set is not searched, e.g. train.micro_batch=8",
    )
    plan.add_argument("--model", required=True, help=f"one of {', '.join(MODELS)}")
    plan.add_argument("--gpus", type=int, required=True, help="total number of GPUs")
    plan.add_argument("--gpu", required=True, help=", ".join(GPUS))
    plan.add_argument("--recipe", default="imagenet256_h", help="source of batch, steps and data (default: imagenet256_h)")
    plan.add_argument("--gpus-per-node", type=int, default=8, help="GPUs per node (default: 8)")
    plan.add_argument(
        "--mfu", type=float, help="share of the peak FLOP/s that forward and backward reach (default: as measured)"
    )
    plan.add_argument(
        "--launch", type=float, help="CPU ms to launch one block's kernels per micro-batch (default: as measured)"
    )
    plan.add_argument("--network", type=float, help="GB/s between nodes of each GPU's own adapter (default: the usual one)")
    plan.add_argument("--out", type=Path, help="folder for config.yaml and ds_config.json (default: write none)")
    plan.set_defaults(run_command=_plan, overridable=True)

    report = commands.add_parser("report", help="one HTML page about a run: curves, trouble, checkpoints, samples, evaluations")
    report.add_argument("run", type=Path, help="a run's folder")
    report.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    report.set_defaults(run_command=_report, overridable=False)

    replay = commands.add_parser("replay", help="run the batch of a guard report again, on one device")
    replay.add_argument("report", type=Path, help="RUN/reports/step-*.json")
    replay.add_argument(
        "--checkpoint",
        type=Path,
        help="a checkpoint, or a run for its newest (default: the report's run, up to that step)",
    )
    replay.set_defaults(run_command=_replay, overridable=False)

    doctor = commands.add_parser(
        "doctor", help="show what this machine really runs: precisions, kernels, versions; and, under a launcher, its network"
    )
    doctor.add_argument("--run-dir", type=Path, help="a folder whose disk speed is measured, by writing")
    doctor.add_argument("--data", type=Path, help="a data set folder whose disk speed is measured, by reading")
    doctor.set_defaults(run_command=_doctor, overridable=False)
    return parser


def _train(options: argparse.Namespace) -> None:
    if options.recipe is None and options.config is None:
        raise UsageError("train needs --recipe or --config")
    values: dict[str, Any] = recipe(options.recipe) if options.recipe else {}
    if options.config:
        values = merge(values, read_yaml(options.config))
    if options.init_from is not None:
        values = merge(values, {"train": {"init_from": options.init_from}})
    config = Config.from_dict(override(values, options.overrides))
    if options.print_config:
        print(config.to_yaml(), end="")
        return
    if options.run_dir is None and options.recipe is None:
        raise UsageError("train needs --run-dir when there is no --recipe to name it after")
    run_dir = options.run_dir or Path("runs") / options.recipe
    stops = StopRequests(run_dir, None if options.stop_after is None else _seconds(options.stop_after))
    with stops.listening():  # from here on, because the imports take seconds
        from xar_scale.train import train

        train(config, run_dir, options.resume, stops)


def _seconds(duration: str) -> float:
    """Parse a duration such as 30s, 90m, 3h50m or 2d."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    if not re.fullmatch(r"(\d+[dhms])+", duration):
        raise UsageError(f"--stop-after {duration} is not a duration such as 30s, 90m, 3h50m or 2d")
    return float(sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)([dhms])", duration)))


def _sample(options: argparse.Namespace) -> None:
    from xar_scale import dist
    from xar_scale.evaluate import classes
    from xar_scale.evaluate.generate import open_generator
    from xar_scale.evaluate.output import SampledImages, check_output
    from xar_scale.evaluate.trained import open_trained

    seeds = classes.parse_seeds(options.seeds)
    for path in options.out:
        check_output(path)
    device = dist.local_device()
    if dist.world() > 1:
        dist.init(device)
    trained = open_trained(options.weights, options.overrides)
    known = trained.model.classes
    chosen = classes.parse_classes(f"0-{min(known, 10) - 1}" if options.classes is None else options.classes, known)
    labels = [label for label in chosen for _ in seeds]
    folders = [path if path.is_dir() or not path.suffix else path.parent for path in options.out]
    dist.on_rank_0(lambda: [*map(make_folder, folders)])  # fail before the work
    generator = open_generator(trained, device)
    images = generator.draw_over_ranks(labels, seeds * len(chosen))
    animated = any(path.suffix == ".gif" for path in options.out)
    drawn = SampledImages(
        images,
        labels,
        seeds * len(chosen),
        {label: classes.title(label, known) for label in chosen},
        [*generator.frames(labels[0], seeds[0])] if animated else [],
    )

    def write() -> None:
        for path in options.out:
            drawn.write(path)

    dist.on_rank_0(write)
    dist.say(f"{len(labels)} images of {trained.source.path}: {', '.join(map(str, options.out))}")


def _evaluate(options: argparse.Namespace) -> None:
    from xar_scale import dist
    from xar_scale.evaluate.evaluation import PAGE, RESULT, Comparison, check_folder, describe, image_set, sha256_of, write
    from xar_scale.evaluate.generate import open_generator
    from xar_scale.evaluate.images import open_images
    from xar_scale.evaluate.trained import holds_weights, is_run, open_trained
    from xar_scale.rng import SEEDS

    if (options.images is not None and options.images < 2) or not 0 <= (options.seed or 0) < SEEDS:
        raise UsageError("--images must be at least 2, --seed from 0 to 2^64 - 1")
    device = dist.local_device()
    if dist.world() > 1:
        dist.init(device)
    if options.out is None and not is_run(options.what):
        raise UsageError(f"{options.what} is not a run: give --out, a folder for the metrics")
    compare = partial(Comparison, options.reference, options.features, device, options.inception_weights)

    def refuse_others(comparison: Comparison, folder: Path, drawn: dict[str, Any]) -> None:
        """Refuse a folder that holds another set before spending hours on this one."""
        dist.on_rank_0(lambda: check_folder(folder / comparison.name, drawn | comparison.description))

    if holds_weights(options.what):
        trained = open_trained(options.what, options.overrides)
        folder = options.out or options.what / "evaluations" / f"step-{trained.source.step:08d}"
        images, comparison = image_set(trained, folder, options.images or 50_000, options.seed or 0), compare()
        dist.on_rank_0(images.open)
        refuse_others(comparison, folder, describe(images, trained))
        if dist.on_rank_0(images.missing):
            images.draw(open_generator(trained, device))
        result = comparison.evaluate(images, images.labels, describe(images, trained))
    else:
        drawing = [*options.overrides, *(f"--{name}" for name in ("images", "seed") if getattr(options, name) is not None)]
        if drawing:
            raise UsageError(f"{drawing[0]}: {options.what} holds images, so none are generated")
        folder, given = options.out, dist.on_all_ranks(lambda: open_images(options.what))
        comparison, sha256 = compare(), dist.on_rank_0(lambda: sha256_of(options.what))
        set_ = {"path": str(options.what), "images": given.count, "sha256": sha256}
        refuse_others(comparison, folder, {"set": set_})
        result = comparison.evaluate(given, given.labels, {"set": set_})
    folder /= comparison.name  # next to the metrics for other references
    dist.on_rank_0(lambda: write(folder, result))
    for name, value in result["metrics"].items():
        dist.say(f"{name:32} {value:.4f}")
    dist.say(f"{folder / RESULT}, {folder / PAGE}")


def _plan(options: argparse.Namespace) -> None:
    from xar_scale.plan import files, text
    from xar_scale.plan.hardware import Machines, find_gpu
    from xar_scale.plan.search import search

    gpu = find_gpu(options.gpu)
    for name, count in (("--gpus", options.gpus), ("--gpus-per-node", options.gpus_per_node)):
        if count < 1:
            raise UsageError(f"{name} {count}: must be at least 1")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise UsageError(f"--mfu {options.mfu:g}: must be above 0 and at most 1")
    if options.launch is not None and not 0 <= options.launch < math.inf:
        raise UsageError(f"--launch {options.launch:g}: must be at least 0 ms")
    if options.network is not None and not 0 < options.network < math.inf:
        raise UsageError(f"--network {options.network:g}: must be above 0 GB/s")
    # fsdp2 is valid with every setting; the engine is searched
    values = merge(recipe(options.recipe), {"model": model_values(options.model), "train": {"engine": "fsdp2"}})
    config = Config.from_dict(override(values, options.overrides))
    fixed = [word.partition("=")[0] for word in options.overrides]
    if "train.ds_config" in fixed:
        raise UsageError("train.ds_config cannot be set: the plan writes one (--out)")
    if options.network is not None:
        gpu = gpu._replace(network=options.network * 1e9)
    machines = Machines(gpu, options.gpus, options.gpus_per_node)
    machines = machines if options.mfu is None else machines._replace(mfu=options.mfu)
    machines = machines if options.launch is None else machines._replace(launch=options.launch / 1e3)
    if options.out:
        files.prepare(options.out)
    found = search(config, machines, fixed)
    print(text.describe(found, options.model, options.gpu))
    if options.out:
        written = files.write(found.best, found.weights, options.out)
        print(f"written: {', '.join(map(str, written))}")


def _report(options: argparse.Namespace) -> None:
    from xar_scale.report.page import build_page

    out = options.out or options.run / "report.html"
    page = build_page(options.run).encode(errors="replace")  # names of files and hosts may hold any bytes
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page)
    print(f"report of {options.run}: {out}, {len(page) / 1e3:,.0f} kB")


def _replay(options: argparse.Namespace) -> None:
    from xar_scale import dist, reports
    from xar_scale.checkpoint.manifest import open_checkpoint
    from xar_scale.replay import find_checkpoint, replay

    recorded = reports.read(options.report)
    checkpoint = open_checkpoint(options.checkpoint) if options.checkpoint else find_checkpoint(recorded)
    print(f"{recorded.summary}\nhere, with the weights after {checkpoint.manifest.step} steps ({checkpoint.path}):")
    reproduced = False
    for attempt in replay(recorded, checkpoint, dist.local_device()):
        bad = reports.names(attempt.verdict.bad)
        reproduced |= attempt.mode == recorded.mode and bool(bad)
        largest = max(attempt.activations, key=lambda name: (math.isnan(attempt.activations[name]), attempt.activations[name]))
        print(
            f"  {attempt.mode}: loss {attempt.verdict.loss:.4g}, gradient norm {attempt.verdict.grad_norm:.4g}, "
            f"not finite: {' and '.join(bad) or 'nothing'}\n"
            f"    first output that is not finite:   {attempt.forward or 'none'}\n"
            f"    first gradient that is not finite: {attempt.backward or 'none'}\n"
            f"    largest activation: {attempt.activations[largest]:.4g}, of {largest}"
        )
    other = "not reproduced: the device is at fault, or the weights between that checkpoint and the step"
    print("reproduced" if reproduced else other)


def _doctor(options: argparse.Namespace) -> None:
    from xar_scale import dist, doctor, environment

    device = dist.local_device()
    if dist.world() > 1:
        dist.init(device)

    def check() -> None:
        if missing := [folder for folder in (options.run_dir, options.data) if folder is not None and not folder.is_dir()]:
            raise UsageError(f"no folder at {missing[0]}, on rank {dist.rank()}")

    dist.on_all_ranks(check)
    machine = doctor.this_machine(device)
    facts = doctor.facts(machine)
    dist.say(aligned(("what", "found"), facts) + "\n")
    titles = ("mode", "TFLOP/s", "compute", "gather", "reduce", "matmul", "attention", "engines", "finding")
    modes = doctor.modes(machine)
    dist.say(aligned(titles, modes) + "\n")
    findings = [*environment.arithmetic(modes), *environment.network(device), *environment.clocks()]
    findings += environment.disk("run", options.run_dir, written=True) if options.run_dir else []
    findings += environment.disk("data", options.data, written=False) if options.data else []
    findings += environment.software(dict(facts))
    findings += environment.settings(os.environ, dist.local_world(), len(os.sched_getaffinity(0)))
    dist.say(aligned(("environment", "found", "what to do"), findings) if findings else "environment: no problems found")
