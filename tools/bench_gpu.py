"""Benchmark one device within minutes: all relevant cases of bench.py's step and sample, their records, and a table.

python tools/bench_gpu.py --out docs/benchmarks --reference ../xAR     # make bench-gpu, on a GPU
"""

import argparse
import datetime
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from xar_scale.bench.record import OURS, PUBLISHED, Record, read_record
from xar_scale.errors import UsageError, XarScaleError
from xar_scale.program import tool_parser

BENCH = Path(__file__).parent / "bench.py"
LONGEST = "| longest |"
LIMIT_S = 240  # per case; none took half of it


class Case(NamedTuple):
    """``published``: also time the published code, if --reference is given."""

    words: str
    published: bool = False


# Most important first: cases that do not fit into the time limit are listed as not run
CASES = [
    Case("step --model xar_h --batch 32 --precision bf16 --compile", published=True),
    Case("step --model xar_b --batch 128 --precision bf16 --compile", published=True),
    Case("sample --model xar_h --batch 64 --steps 10 --precision bf16 --repeats 2 --compile", published=True),
    Case("step --model xar_h --batch 64 --precision bf16 --compile"),
    Case("step --model xar_h --batch 32 --precision bf16"),
    Case("step --model xar_h --batch 32 --precision tf32 --compile"),
    Case("step --model xar_h --batch 32 --precision bf16 --engine fsdp2 --compile"),
    Case("step --model xar_h --batch 32 --precision bf16 --engine deepspeed"),
    Case("step --model xar_l --batch 64 --precision bf16 --compile", published=True),
    Case("step --model xar_h --batch 64 --precision bf16 --recompute full --compile"),
    Case("step --model xar_h --batch 64 --precision bf16 --recompute selective"),
    *(
        Case(f"step --model xar_b --batch 128 --precision bf16 --dropout 0 --attention {name}")
        for name in ("flash", "masked", "prefix", "dense", "flex")
    ),
    Case("sample --model xar_b --batch 64 --steps 10 --precision bf16 --repeats 2", published=True),
    Case("step --model xar_b --batch 128 --precision tf32"),
]


class Done(NamedTuple):
    words: str
    record: Record | None
    said: str  # its output, or if it failed the last line of it


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for DATE-gpu.md (DATE-small.md) and, in records/, a file per case"
    )
    parser.add_argument("--reference", type=Path, help="checkout of the published code")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no case after this many minutes (default: 8)")
    parser.add_argument("--small", action="store_true", help="run every case with nano and two images, to check that it works")
    return parser.run(run)


def run(options: argparse.Namespace) -> None:
    if not options.small and not torch.cuda.is_available():
        raise UsageError("no GPU found; --small runs every case with a small model on a CPU")
    (options.out / "records").mkdir(parents=True, exist_ok=True)
    begun, name = time.monotonic(), f"{datetime.date.today()}-{'small' if options.small else 'gpu'}"
    done = []
    for number, case in enumerate(CASES):
        if time.monotonic() - begun > 60 * options.minutes:
            done.append(Done(case.words, None, "not run: out of time"))
        else:
            done.append(_measured(case, options, options.out / "records" / f"{name}-{number:02d}.json"))
            print(_row(done[-1]), flush=True)
        (options.out / f"{name}.md").write_text(_page(done))  # after each case: an interrupted run leaves its results
    if not any(each.record for each in done):
        raise XarScaleError(f"no case was measured; {options.out / name}.md says why")


def _measured(case: Case, options: argparse.Namespace, file: Path) -> Done:
    words = case.words.split()
    if options.small:
        for option, value in (("--model", "nano"), ("--batch", "2"), ("--steps", "2")):
            if option in words:
                words[words.index(option) + 1] = value
        words += ["--grid", "8"]
    elif case.published and options.reference:
        words += ["--reference", str(options.reference)]
    file.unlink(missing_ok=True)  # from an earlier run that day
    command = [sys.executable, str(BENCH), *words, "--json", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return Done(" ".join(words), None, f"timed out after {LIMIT_S} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Done(" ".join(words), None, f"exited with code {done.returncode}: {last}")
    return Done(" ".join(words), read_record(file), done.stdout)


def _row(done: Done) -> str:
    record = done.record
    if record is None:
        return f"| `{done.words}` | {done.said} | | | | |"
    mfu = "" if record.mfu is None else f"{record.mfu:.0%}"
    speedup = f"{record.speedup(PUBLISHED):.2f}" if PUBLISHED in record.seconds else ""
    speed = f"{record.median(OURS) * 1e3:.4g} | {record.images / record.median(OURS):.4g} | {mfu}"
    return f"| `{done.words}` | {speed} | {record.memory_gb or 0:.1f} | {speedup} |"


def _page(done: list[Done]) -> str:
    measured = [each for each in done if each.record is not None]
    where = measured[0].record.machine if measured and measured[0].record else "nothing was measured"
    head = "| `tools/bench.py` | ms | images/s | MFU | GB | speedup over published |\n| --- | --- | --- | --- | --- | --- |"
    rows = "\n".join(_row(each) for each in done)
    shown = next((each for each in measured if LONGEST in each.said), None)
    longest = f"Longest in `{shown.words}`:\n\n{LONGEST}{shown.said.partition(LONGEST)[2].rstrip()}\n" if shown else ""
    title = f"# {datetime.date.today()}: training steps and sampling on one device"
    how = f"{where}. `make bench-gpu`; medians, each case in its own process."
    return f"{title}\n\n{how}\n\n{head}\n{rows}\n\n{longest}"


if __name__ == "__main__":
    sys.exit(main())
