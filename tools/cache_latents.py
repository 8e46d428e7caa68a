"""Images through a tokenizer into WebDataset tars of latents.

python tools/cache_latents.py digits --out runs/demo/data
"""

import argparse
import sys
from pathlib import Path

from xar_scale.cli import Parser, ending
from xar_scale.evaluate.digits import cache_digits


def main() -> int:
    parser = Parser(prog="cache_latents", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["digits"], help="digits: the 1,797 that ship with scikit-learn")
    parser.add_argument("--out", type=Path, required=True, help="the data set's folder")
    parser.add_argument("--samples-per-shard", type=int, default=256)

    def run() -> None:
        options = parser.parse_args()
        samples, shards = cache_digits(options.out, options.samples_per_shard)
        print(f"{samples} samples in {shards} shards: {options.out}")

    return ending("cache_latents", run)


if __name__ == "__main__":
    sys.exit(main())
