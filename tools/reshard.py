"""Convert a checkpoint to another format, block by block: no GPU is needed, and memory does not grow with the model.

python tools/reshard.py runs/imagenet256_h/checkpoints/step-00500000 xar_h.safetensors --to safetensors --weights ema
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from xar_scale.checkpoint.interop import Source, open_source
from xar_scale.checkpoint.reshard import TARGETS, plan, verifiable, write
from xar_scale.checkpoint.reshard.parts import Plan
from xar_scale.errors import UsageError
from xar_scale.program import tool_parser

SHOWN = 16  # files that a dry run lists
ATTEMPTS = 3  # at a checkpoint of a run that is training, which may drop the one that is being verified


def main() -> int:
    parser = tool_parser(
        __file__,
        __doc__,
        epilog="exit codes: 0 done, 64 usage, 65 bad data, 74 files. After an interruption, run it again to resume.",
    )
    parser.add_argument("source", type=Path, help="xar-scale or DeepSpeed (ZeRO, universal) folder, .pth, safetensors")
    parser.add_argument("destination", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--weights", choices=("model", "ema"), help="safetensors (default: ema if there is one), pth (both)")
    parser.add_argument("--files", type=int, help="xar-scale: number of files (default 8)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be written, and write nothing")
    parser.add_argument("--trust-pickle", action="store_true", help="allow the source's pickles to run code")
    return parser.run(reshard)


def reshard(options: argparse.Namespace) -> None:
    if options.weights and options.to not in ("safetensors", "pth"):
        raise UsageError(f"--weights applies to safetensors and pth, not to {options.to}")
    if options.files is not None and options.to != "xar-scale":
        raise UsageError(f"--files applies to xar-scale, not to {options.to}")
    if options.files is not None and options.files < 1:
        raise UsageError(f"--files is {options.files}, must be at least 1")
    if options.destination.exists():
        raise UsageError(f"{options.destination} exists already; nothing is overwritten")
    for attempts_left in reversed(range(ATTEMPTS)):
        with open_source(options.source, options.trust_pickle) as source:
            planned = plan(source, options.to, options.weights, options.files or 8)
            _show(source, planned, options)
            if options.dry_run:
                break
            options.destination.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(source, planned, options.destination)
                break
            except FileNotFoundError:
                if source.path == options.source or source.path.exists() or not attempts_left:
                    raise
        print(f"{source.path} is gone: the run has dropped it; converting a newer checkpoint", flush=True)


def _show(source: Source, planned: Plan, options: argparse.Namespace) -> None:
    parameters = sum(shape.numel() for shape in source.names("model").values())
    step = "" if source.step is None else f", step {source.step}"
    print(f"{source.path}: {source.format}{step}: {', '.join(source.kinds)} of {parameters:,} parameters")
    writes = "would write" if options.dry_run else "writing"
    print(
        f"{writes} {options.destination} as {options.to}: {len(planned.outputs) + 1:,} files, {planned.size:,} bytes",
        flush=True,
    )
    if options.dry_run:
        for output in planned.outputs[:SHOWN]:
            print(f"  {output.size:>14,}  {output.name}")
        if len(planned.outputs) > SHOWN:
            print(f"  and {len(planned.outputs) - SHOWN:,} more")


def _write(source: Source, planned: Plan, destination: Path) -> None:
    if sys.stderr.isatty():
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            reading = bar.add_task("verifying", total=_verified_bytes(source))
            writing = bar.add_task("writing", total=planned.size)
            write(source, planned, destination, lambda n: bar.advance(reading, n), lambda n: bar.advance(writing, n))
    else:
        write(source, planned, destination, _lines("verified", _verified_bytes(source)), _lines("written", planned.size))
    print(f"done: {destination}")


def _verified_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in verifiable(source))


def _lines(what: str, total: int) -> Callable[[int], None]:
    """Report progress in a line per tenth."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if done * 10 // max(total, 1) > before * 10 // max(total, 1):
            print(f"{what} {done:,} of {total:,} bytes", flush=True)

    return advance


if __name__ == "__main__":
    sys.exit(main())
