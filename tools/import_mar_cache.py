"""Convert MAR's cache of latents (one folder per class, one .npz per sample) to shards.

python tools/import_mar_cache.py /data/cached_latents --out /data/latents --weights kl16.ckpt
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

from rich.progress import track

from xar_scale.data.foreign import mar_samples
from xar_scale.data.shards import DatasetInfo, ShardWriter
from xar_scale.errors import UsageError
from xar_scale.program import tool_parser
from xar_scale.tokenizers.kl16 import KL16Tokenizer


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("cache", type=Path, help="the folder of class folders")
    parser.add_argument("--out", type=Path, required=True, help="the data set's folder")
    parser.add_argument("--weights", type=Path, required=True, help="the kl16.ckpt that made it; its hash identifies the set")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--samples-per-shard", type=int, default=1024)
    return parser.run(run)


def run(options: argparse.Namespace) -> None:
    if not options.cache.is_dir():
        raise UsageError(f"no folder at {options.cache}")
    tokenizer = KL16Tokenizer(options.weights)  # raises if it is not a kl16.ckpt
    files = sum(1 for _ in options.cache.glob("*/*.npz"))
    samples = mar_samples(options.cache, options.dtype)
    first = next(samples)
    info = DatasetInfo(
        tokenizer={"name": tokenizer.name, **tokenizer.settings},
        latent_scale=tokenizer.latent_scale,
        stored="moments",
        shape=first.latent.shape,
        dtype=options.dtype,
        classes=sum(path.is_dir() for path in options.cache.iterdir()),
        flipped=True,
    )
    with ShardWriter(options.out, info, samples_per_shard=options.samples_per_shard) as writer:
        for sample in track(chain([first], samples), "importing", total=files, disable=not sys.stderr.isatty()):
            writer.add(*sample)
    print(f"{files:,} samples in {len(writer.shards):,} shards: {options.out}")


if __name__ == "__main__":
    sys.exit(main())
