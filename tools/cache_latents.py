"""Encode images with a tokenizer into WebDataset tars of latents.

python tools/cache_latents.py digits --out runs/demo/data
python tools/cache_latents.py images /data/imagenet/train --out /data/latents --weights kl16.ckpt
torchrun --nproc-per-node 8 tools/cache_latents.py images /data/imagenet/train --out /data/latents --weights kl16.ckpt
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xar_scale import dist
from xar_scale.data.encode import EncodeSettings, Reporter, encode_set, finished_set
from xar_scale.data.index import LABEL
from xar_scale.data.shards import DatasetInfo
from xar_scale.errors import DataError, UsageError, XarScaleError
from xar_scale.evaluate.digits import cache_digits
from xar_scale.precision import MODES, apply_matmul_mode
from xar_scale.program import Parser, tool_parser
from xar_scale.tokenizers import Tokenizer, create_tokenizer, parse_tokenizer

LINE_S = 30.0  # between progress lines, if there is no bar


def main() -> int:
    return _parser().run(run)


def run(options: argparse.Namespace) -> None:
    try:
        options.run_command(options)
    except XarScaleError as error:
        error.rank = dist.rank()  # ranks share no process group here, so each reports its own errors
        raise


def _parser() -> Parser:
    parser = tool_parser(__file__, __doc__)
    commands = parser.add_subparsers(title="what to encode", required=True, metavar="WHAT")

    digits = commands.add_parser("digits", help="the 1,797 digits that ship with scikit-learn")
    digits.add_argument("--out", type=Path, required=True, help="the data set's folder")
    digits.add_argument("--samples-per-shard", type=int, default=256)
    digits.set_defaults(run_command=_digits)

    images = commands.add_parser(
        "images",
        help="one folder per class, or WebDataset tars",
        epilog="If stopped, the same command resumes. Many processes share the work under torchrun, or any launcher that sets "
        "RANK and WORLD_SIZE (and LOCAL_RANK, the GPU's number).",
    )
    images.add_argument("source", type=Path, help="a tree with one folder per class, or a folder of tars")
    images.add_argument("--out", type=Path, required=True, help="the data set's folder")
    images.add_argument("--tokenizer", default="kl16", help="its name, or its name and settings as JSON (default: kl16)")
    images.add_argument("--weights", type=Path, help="the path of kl16.ckpt; required by tokenizer kl16")
    images.add_argument("--size", type=int, default=256, help="side of the square crop, in pixels")
    images.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="of the stored arrays")
    images.add_argument("--no-flip", action="store_true", help="do not encode the mirrored images")
    images.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="of the tokenizer's network")
    images.add_argument("--batch", type=int, default=32, help="images per forward pass of the network")
    images.add_argument("--workers", type=int, default=2, help="decoding processes for each encoding process")
    images.add_argument("--samples-per-shard", type=int, default=1024)
    images.add_argument("--max-bad", type=int, default=0, help="how many bad images may be left out")
    images.add_argument("--classes", type=int, help="number of classes (default: the number of folders; required for tars)")
    images.add_argument("--image", default="jpg", help=f"extension of a sample's image in a tar; its label is {LABEL}")
    images.set_defaults(run_command=_images)
    return parser


def _digits(options: argparse.Namespace) -> None:
    samples, shards = cache_digits(options.out, options.samples_per_shard)
    print(f"{samples} samples in {shards} shards: {options.out}")


def _images(options: argparse.Namespace) -> None:
    for name, least in (("size", 1), ("batch", 1), ("samples-per-shard", 1), ("classes", 1), ("workers", 0), ("max-bad", 0)):
        if (number := getattr(options, name.replace("-", "_"))) is not None and number < least:
            raise UsageError(f"--{name} must be at least {least}, not {number}")
    tokenizer = _tokenizer(options)
    settings = EncodeSettings(
        source=str(options.source.resolve()),
        tokenizer={"name": tokenizer.name, **tokenizer.settings},
        size=options.size,
        dtype=options.dtype,
        flipped=not options.no_flip,
        precision=options.precision,
        batch=options.batch,
        samples_per_shard=options.samples_per_shard,
        classes=options.classes,
        image=options.image,
    )
    if (info := finished_set(options.out, settings)) is not None:
        dist.say(f"already complete: {_summary(info)}: {options.out}")
        return
    with _Display() as display:
        info = encode_set(options.out, settings, tokenizer, workers=options.workers, max_bad=options.max_bad, reporter=display)
    if info is not None:
        dist.say(f"{_summary(info)}: {options.out}")


def _summary(info: DatasetInfo) -> str:
    skipped = len(info.images["skipped"])
    return f"{info.samples:,} samples in {len(info.shards):,} shards, {skipped:,} bad images skipped"


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Return the tokenizer, on this rank's device and in the requested precision."""
    given = options.tokenizer
    description = parse_tokenizer(given) if given.lstrip().startswith("{") else {"name": given}
    if (description["name"] == "kl16") != (options.weights is not None):
        what = "tokenizer kl16 needs --weights" if options.weights is None else "--weights is only for tokenizer kl16"
        raise UsageError(f"{what}, the path of kl16.ckpt; --tokenizer is {description['name']}")
    apply_matmul_mode(options.precision)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # the same bits at every start
    device = dist.local_device()
    if options.weights is None:
        try:
            tokenizer = create_tokenizer(description)
        except DataError as error:  # the command line is at fault, not data
            raise UsageError(f"--tokenizer: {error}") from None
        if tokenizer.image_channels not in (1, 3):
            raise UsageError(f"--tokenizer: image_channels {tokenizer.image_channels} is not 1 or 3")
        return tokenizer
    if not options.weights.is_file():
        raise UsageError(f"no weights at {options.weights}")
    description.setdefault("sha256", hashlib.sha256(options.weights.read_bytes()).hexdigest())
    return create_tokenizer(description, options.weights, device, batch=options.batch, compute=MODES[options.precision].compute)


class _Display(Reporter):
    """Log lines on standard error; on rank 0 also the progress of all ranks: a bar in a terminal, else occasional lines."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("images"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[rest]}  ETA"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=dist.rank() != 0 or not console.is_terminal,
        )
        self.task = self.bar.add_task("encode", total=None, rest="")
        self.first: tuple[float, int] | None = None  # the first report: its time, and how many images were done
        self.said = time.monotonic()

    def __enter__(self) -> "_Display":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def log(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, bad: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, done)
            self.bar.update(self.task, total=total, completed=done)
        rate = (done - self.first[1]) / max(now - self.first[0], 1e-9)
        rest = f"{rate:,.0f} images/s  {bad:,} bad"
        self.bar.update(self.task, completed=done, rest=rest)
        if dist.rank() == 0 and self.bar.disable and now - self.said > LINE_S:
            self.said = now
            left = f"{(total - done) / rate:,.0f} s" if rate else "?"
            print(f"{done:,}/{total:,} images  {rest}  ETA {left}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
