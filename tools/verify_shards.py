"""Read every byte of a data set and report faults by shard and sample.

python tools/verify_shards.py runs/demo/data
"""

import argparse
import os
import sys
from pathlib import Path

from rich.progress import track

from xar_scale.cli import Parser, exit_code_of
from xar_scale.data.reader import LatentShards
from xar_scale.data.verify import stray_files, verify_set
from xar_scale.errors import DataError, UsageError


def main() -> int:
    parser = Parser(prog="verify_shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the data set's folder")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)

    def run() -> None:
        options = parser.parse_args()
        if options.processes < 1:
            raise UsageError(f"--processes must be at least 1, not {options.processes}")
        verify(options.data, options.processes)

    return exit_code_of("verify_shards", run)


def verify(data: Path, processes: int) -> None:
    shards = LatentShards(data)
    info = shards.info
    bad_shards = count = 0
    progress = track(verify_set(shards, processes), "verifying", total=len(info.shards), disable=not sys.stderr.isatty())
    for _, faults in progress:
        bad_shards += bool(faults)
        count += len(faults)
        for fault in faults:
            print(fault, flush=True)
    for name in stray_files(data, info):
        print(f"{data / name} is not in the set")
    if count:
        raise DataError(f"{data}: {count} faults in {bad_shards} of {len(info.shards)} shards")
    print(f"{data}: {info.samples:,} samples in {len(info.shards):,} shards, every byte as written, every value finite")


if __name__ == "__main__":
    sys.exit(main())
