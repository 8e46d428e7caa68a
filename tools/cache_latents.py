"""Images through a tokenizer into WebDataset tars of latents.

python tools/cache_latents.py digits --out runs/demo/data
"""

import argparse
import sys
from pathlib import Path

from xar_scale.cli import Parser, ending
from xar_scale.data.shards import DatasetInfo, ShardWriter
from xar_scale.evaluate.digits import CLASSES, load_digits
from xar_scale.tokenizers.pixel import PixelTokenizer


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


def cache_digits(folder: Path, samples_per_shard: int) -> tuple[int, int]:
    """Returns the numbers of samples and shards written."""
    images, labels = load_digits()
    tokenizer = PixelTokenizer(patch=2)
    latents = tokenizer.encode(images)
    info = DatasetInfo(
        tokenizer={"name": tokenizer.name, **tokenizer.settings},
        latent_scale=tokenizer.latent_scale,
        stored="latents",
        shape=latents.shape[1:],
        dtype="float16",
        classes=CLASSES,
        flipped=False,
    )
    with ShardWriter(folder, info, prefix="digits", samples_per_shard=samples_per_shard) as writer:
        for number, (latent, label) in enumerate(zip(latents, labels, strict=True)):
            writer.add(f"{number:06d}", int(label), latent)
    return len(latents), len(writer.shards)


if __name__ == "__main__":
    sys.exit(main())
