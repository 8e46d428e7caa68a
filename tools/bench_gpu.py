"""What a device does, within minutes: bench.py's step and sample in all ways that matter, their records, and a table of them.

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
from xar_scale.cli import Parser, ending
from xar_scale.errors import UsageError, XarScaleError

BENCH = Path(__file__).parent / "bench.py"
LONGEST = "| longest |"
LIMIT_S = 240  # of a case; none took half of it


class Case(NamedTuple):
    """``published``: whether the published code is timed beside it, where it is given."""

    words: str
    published: bool = False


# What matters most comes first: what no time is left for is named, and not run
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
    said: str  # its output; where it failed, its last line


def main() -> int:
    parser = Parser(prog="bench_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for DATE-gpu.md (DATE-small.md) and, in records, a file a case"
    )
    parser.add_argument("--reference", type=Path, help="a checkout of the published code")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no case is begun (default: 8)")
    parser.add_argument("--small", action="store_true", help="every case with nano and two images: whether it runs at all")

    def run() -> None:
        options = parser.parse_args()
        if not options.small and not torch.cuda.is_available():
            raise UsageError("no GPU is here; --small runs every case with a small model on a CPU")
        (options.out / "records").mkdir(parents=True, exist_ok=True)
        begun, name = time.monotonic(), f"{datetime.date.today()}-{'small' if options.small else 'gpu'}"
        done = []
        for number, case in enumerate(CASES):
            if time.monotonic() - begun > 60 * options.minutes:
                done.append(Done(case.words, None, "not run: no time was left"))
            else:
                done.append(_run(case, options, options.out / "records" / f"{name}-{number:02d}.json"))
                print(_row(done[-1]), flush=True)
            (options.out / f"{name}.md").write_text(_page(done))  # each time: whatever ends it leaves what it has
        if not any(each.record for each in done):
            raise XarScaleError(f"no case was measured; {options.out / name}.md says why")

    return ending("bench_gpu", run)


def _run(case: Case, options: argparse.Namespace, file: Path) -> Done:
    words = case.words.split()
    if options.small:
        for option, value in (("--model", "nano"), ("--batch", "2"), ("--steps", "2")):
            if option in words:
                words[words.index(option) + 1] = value
        words += ["--grid", "8"]
    elif case.published and options.reference:
        words += ["--reference", str(options.reference)]
    file.unlink(missing_ok=True)  # of an earlier run of that day
    command = [sys.executable, str(BENCH), *words, "--json", str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return Done(" ".join(words), None, f"ended after {LIMIT_S} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Done(" ".join(words), None, f"ended with code {done.returncode}: {last}")
    return Done(" ".join(words), read_record(file), done.stdout)


def _row(done: Done) -> str:
    record = done.record
    if record is None:
        return f"| `{done.words}` | {done.said} | | | | |"
    mfu = "" if record.mfu is None else f"{record.mfu:.0%}"
    times = f"{record.speedup(PUBLISHED):.2f}" if PUBLISHED in record.seconds else ""
    speed = f"{record.median(OURS) * 1e3:.4g} | {record.images / record.median(OURS):.4g} | {mfu}"
    return f"| `{done.words}` | {speed} | {record.memory_gb or 0:.1f} | {times} |"


def _page(done: list[Done]) -> str:
    measured = [each for each in done if each.record is not None]
    where = measured[0].record.machine if measured and measured[0].record else "nothing was measured"
    head = "| `tools/bench.py` | ms | images/s | MFU | GB | times the published code's |\n| --- | --- | --- | --- | --- | --- |"
    rows = "\n".join(_row(each) for each in done)
    shown = next((each for each in measured if LONGEST in each.said), None)
    longest = f"Longest in `{shown.words}`:\n\n{LONGEST}{shown.said.partition(LONGEST)[2].rstrip()}\n" if shown else ""
    title = f"# {datetime.date.today()}: training steps and sampling on one device"
    how = f"{where}. `make bench-gpu`; medians, each case in a process of its own."
    return f"{title}\n\n{how}\n\n{head}\n{rows}\n\n{longest}"


if __name__ == "__main__":
    sys.exit(main())
