"""The command line: xar-scale train | sample | evaluate | replay | doctor."""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xar_scale.config import Config, merge, override, read_yaml
from xar_scale.errors import OK, DataError, ProcessError, UsageError, XarScaleError
from xar_scale.files import write_atomically
from xar_scale.presets import RECIPES, recipe
from xar_scale.stopping import Stops


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Endings on purpose are one line on standard error and a documented exit code."""

    def run() -> None:
        options = _parse(arguments)
        options.run_command(options)

    return ending("xar-scale", run)


def ending(program: str, run: Callable[[], None]) -> int:
    """The exit code of ``run``, its error on standard error as one line. Of several ranks the one that met it speaks, or 0."""
    from xar_scale import dist

    dist.adopt_launcher()
    try:
        run()
    except (XarScaleError, OSError) as caught:
        error = caught if isinstance(caught, XarScaleError) else dist.file_error(caught)
        if error is not caught:  # this rank's alone: what ranks share has become an error of ours
            error.rank = dist.rank()
        if dist.rank() == (error.rank or 0):
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        return error.exit_code  # without leaving the process group: other ranks may be waiting in it for the launcher
    except RuntimeError as error:
        if not dist.is_lost_rank(error):
            raise
        print(f"{program}: rank {dist.rank()} has lost another rank: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return ProcessError.exit_code
    dist.close()
    return OK


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options in any order with ``section.key=value`` overrides among them, which argparse has no word for."""
    parser, words = _parser(), list(sys.argv[1:] if arguments is None else arguments)
    overrides = [word for word in words if re.match(r"[a-z_]+\.[a-z_.]+=", word)]  # wherever they stand
    options, rest = parser.parse_known_args([word for word in words if word not in overrides])
    overrides += [word for word in rest if "=" in word and not word.startswith("-")]  # which will be told what is wrong
    options.overrides = overrides if options.overridable else []
    if unknown := [word for word in (*rest, *overrides) if word not in options.overrides]:
        parser.error(f"unknown argument {unknown[0]}")
    return options


class Parser(argparse.ArgumentParser):
    """Options in full only, since launchers pass theirs too; what is wrong is a UsageError."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help shows what there is)")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="xar-scale",
        description="Train, sample and check xAR and larger next-X image models.",
        epilog="exit codes: 0 done, 64 usage, 65 bad data, 69 a hang, 70 non-finite, 71 a process died, 74 files, "
        "75 preempted, 76 stopped as asked, 78 config",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it; the environment says it too
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model, under a launcher or in one process",
        epilog="section.key=value arguments are laid over everything else, e.g. optim.lr=1e-4",
    )
    train.add_argument("--recipe", help=f"where the config starts: {', '.join(RECIPES)}")
    train.add_argument("--config", type=Path, help="a YAML file laid over the recipe")
    train.add_argument("--run-dir", type=Path, help="folder of checkpoints, metrics and the config (default: runs/RECIPE)")
    train.add_argument("--resume", default="auto", help="auto (the newest valid checkpoint of the run), none, or a path")
    train.add_argument("--init-from", help="a run, a checkpoint, a .pth or safetensors whose weights a new run begins with")
    train.add_argument("--stop-after", metavar="TIME", help="30s, 90m, 3h50m, 2d: end then, with a checkpoint")
    train.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and stop")
    train.set_defaults(run_command=_train, overridable=True)

    sample = commands.add_parser(
        "sample",
        help="draw images from a run or checkpoint",
        epilog="sample.key=value and kernels.key=value arguments are laid over the run's config, e.g. sample.guidance=1.5",
    )
    sample.add_argument("checkpoint", type=Path, help="a run's folder, or one checkpoint's")
    sample.add_argument("--classes", help="numbers with commas (default: all)")
    sample.add_argument("--per-class", type=int, default=10)
    sample.add_argument("--show", type=int, default=10, help="images a class in the grid")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", type=Path, required=True, help="the grid, a PNG; all images go to the .npz of the same name")
    sample.set_defaults(run_command=_sample, overridable=True)

    evaluate = commands.add_parser("evaluate", help="judge samples of the digits by a classifier fitted on the real ones")
    evaluate.add_argument("samples", type=Path, help="the .npz that `xar-scale sample` wrote")
    evaluate.add_argument("--out", type=Path, required=True, help="the verdict, a JSON file")
    evaluate.set_defaults(run_command=_evaluate, overridable=False)

    replay = commands.add_parser("replay", help="run the batch of a guard's report again, on one device")
    replay.add_argument("report", type=Path, help="RUN/reports/step-*.json")
    replay.add_argument("--checkpoint", type=Path, help="whose weights (default: the run's newest of that step or before)")
    replay.set_defaults(run_command=_replay, overridable=False)

    doctor = commands.add_parser(
        "doctor", help="show what this machine really runs: precisions, kernels, versions; and, under a launcher, its network"
    )
    doctor.add_argument("--run-dir", type=Path, help="a folder whose disk is measured, by writing")
    doctor.add_argument("--data", type=Path, help="a data set's folder, whose disk is measured, by reading")
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
    stops = Stops(run_dir, None if options.stop_after is None else _seconds(options.stop_after))
    with stops.listening():  # already while what takes seconds is imported
        from xar_scale.train import train

        train(config, run_dir, options.resume, stops)


def _seconds(duration: str) -> float:
    """Of 30s, 90m, 3h50m, 2d."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    if not re.fullmatch(r"(\d+[dhms])+", duration):
        raise UsageError(f"--stop-after {duration} is no time such as 30s, 90m, 3h50m or 2d")
    return float(sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)([dhms])", duration)))


def _sample(options: argparse.Namespace) -> None:
    import numpy as np

    from xar_scale import dist
    from xar_scale.evaluate.generate import draw_grid, generate, open_checkpoint

    if options.per_class < 1 or options.show < 1:
        raise UsageError("--per-class and --show are at least 1")
    if options.out.suffix != ".png":
        raise UsageError(f"--out {options.out} is not a .png")
    if wrong := [word for word in options.overrides if not word.startswith(("sample.", "kernels."))]:
        raise UsageError(f"{wrong[0]}: only sample.* and kernels.* can be changed when sampling")
    checkpoint = open_checkpoint(options.checkpoint)
    config = Config.from_dict(override(checkpoint.manifest.config, options.overrides))
    try:
        classes = [int(name) for name in options.classes.split(",")] if options.classes else range(config.model.classes)
    except ValueError:
        raise UsageError(f"--classes {options.classes!r} is not numbers with commas") from None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    labels = [label for label in classes for _ in range(options.per_class)]
    images = generate(checkpoint, labels, config.sample, options.seed, dist.local_device(), config.kernels)
    archive = options.out.with_suffix(".npz")
    np.savez(archive, images=images, labels=np.array(labels))
    draw_grid({str(label): images[np.equal(labels, label)][: options.show] for label in classes}, options.out)
    print(f"{len(labels)} images of {checkpoint.path}: {options.out}, {archive}")


def _evaluate(options: argparse.Namespace) -> None:
    import zipfile

    import numpy as np

    from xar_scale.evaluate.digits import judge

    if not options.samples.is_file():
        raise UsageError(f"no samples at {options.samples}")
    try:
        with np.load(options.samples, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        raise DataError(f"{options.samples} is not what `xar-scale sample` writes") from None
    verdict = judge(images, labels)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(dataclasses.asdict(verdict), indent=1).encode())
    print(f"samples read as the class asked for: {verdict.samples:.1%} of {verdict.sample_count}")
    print(f"held-out real digits read rightly:   {verdict.held_out:.1%} of {verdict.held_out_count}")


def _replay(options: argparse.Namespace) -> None:
    from xar_scale import dist, reports
    from xar_scale.checkpoint.manifest import verify
    from xar_scale.replay import find_checkpoint, replay

    recorded = reports.read(options.report)
    checkpoint = verify(options.checkpoint) if options.checkpoint else find_checkpoint(recorded)
    print(f"{recorded.summary}\nhere, with the weights after {checkpoint.manifest.step} steps ({checkpoint.path}):")
    reproduced = False
    for attempt in replay(recorded, checkpoint, dist.local_device()):
        bad = reports.names(attempt.verdict.bad)
        reproduced |= attempt.mode == recorded.mode and bool(bad)
        largest = max(attempt.activations, key=lambda name: attempt.activations[name])
        print(
            f"  {attempt.mode}: loss {attempt.verdict.loss:.4g}, gradient norm {attempt.verdict.grad_norm:.4g}, "
            f"not finite: {' and '.join(bad) or 'nothing'}\n"
            f"    first output that is not finite:   {attempt.forward or 'none'}\n"
            f"    first gradient that is not finite: {attempt.backward or 'none'}\n"
            f"    largest activation: {attempt.activations[largest]:.4g}, of {largest}"
        )
    print(
        "reproduced" if reproduced else "not reproduced: it was the device, or the weights between that checkpoint and the step"
    )


def _doctor(options: argparse.Namespace) -> None:
    from xar_scale import dist, doctor, surroundings

    device = dist.local_device()
    if dist.world() > 1:
        dist.init(device)

    def check() -> None:
        if missing := [folder for folder in (options.run_dir, options.data) if folder is not None and not folder.is_dir()]:
            raise UsageError(f"no folder at {missing[0]}, on rank {dist.rank()}")

    dist.together(check)
    machine = doctor.this_machine(device)
    facts = doctor.facts(machine)
    dist.say(doctor.table(("what", "found"), facts) + "\n")
    titles = ("mode", "TFLOP/s", "compute", "gather", "reduce", "matmul", "attention", "engines", "finding")
    modes = doctor.modes(machine)
    dist.say(doctor.table(titles, modes) + "\n")
    findings = [*surroundings.network(device), *surroundings.clocks()]
    findings += surroundings.disk("run", options.run_dir, written=True) if options.run_dir else []
    findings += surroundings.disk("data", options.data, written=False) if options.data else []
    findings += surroundings.software(dict(facts))
    findings += surroundings.settings(os.environ, dist.local_world(), len(os.sched_getaffinity(0)))
    dist.say(doctor.table(("around it", "found", "what to do"), findings) if findings else "around it: nothing to be done")


if __name__ == "__main__":
    sys.exit(main())
