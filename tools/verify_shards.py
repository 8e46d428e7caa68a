"""Read every byte of a data set and report faults by shard and sample.

python tools/verify_shards.py runs/demo/data
"""

import os
import sys
from pathlib import Path

from rich.progress import track

from xar_scale.data.reader import LatentShards
from xar_scale.data.verify import stray_files, verify_set
from xar_scale.errors import DataError, UsageError
from xar_scale.program import tool_parser


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("data", type=Path, help="the data set's folder")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser.run(lambda options: verify(options.data, options.processes))


def verify(data: Path, processes: int) -> None:
    if processes < 1:
        raise UsageError(f"--processes must be at least 1, not {processes}")
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
