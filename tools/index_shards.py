"""Index a folder of WebDataset tars of latents, made by any tool, so that it becomes a data set. The tars are not changed.

python tools/index_shards.py /data/tars --latent latent.npy --label cls --stored moments --latent-scale 0.2325 --classes 1000 \\
    --tokenizer '{"name": "kl16", "sha256": "..."}'
"""

import argparse
import math
import os
import sys
from pathlib import Path

from xar_scale.data.foreign import index_set
from xar_scale.data.index import FLIPPED, LABEL, LATENT, Members
from xar_scale.errors import UsageError
from xar_scale.program import tool_parser
from xar_scale.tokenizers import parse_tokenizer


def main() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("data", type=Path, help="the folder of tars; the index is written there")
    parser.add_argument("--latent", default=LATENT, help="extension of a sample's array, a .npy: what follows its key")
    parser.add_argument("--flipped", help="extension of the mirrored image's array, if there is one")
    parser.add_argument("--label", default=LABEL, help="extension of the label, a decimal number")
    parser.add_argument("--stored", choices=["latents", "moments"], required=True)
    parser.add_argument("--latent-scale", type=float, required=True, help="factor that scales stored latents to unit size")
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--tokenizer", required=True, help="name and settings, as JSON")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    return parser.run(run)


def run(options: argparse.Namespace) -> None:
    if min(options.processes, options.classes) < 1:
        raise UsageError("--processes and --classes must be at least 1")
    if not 0 < options.latent_scale < math.inf:
        raise UsageError(f"--latent-scale {options.latent_scale} is not a positive number")
    info = index_set(
        options.data,
        Members(options.latent, options.flipped or FLIPPED, options.label),
        flipped=options.flipped is not None,
        tokenizer=parse_tokenizer(options.tokenizer),
        latent_scale=options.latent_scale,
        stored=options.stored,
        classes=options.classes,
        processes=options.processes,
    )
    print(f"{info.samples:,} samples in {len(info.shards):,} shards, {info.dtype}{info.shape}: {options.data}")


if __name__ == "__main__":
    sys.exit(main())
