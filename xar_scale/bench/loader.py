"""Data loading: our reader against others on the same latents, and the sample order at cluster scale."""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from xar_scale.bench.memory import resident
from xar_scale.config import Config, merge
from xar_scale.data.loader import LatentDataset
from xar_scale.data.order import SampleOrder
from xar_scale.data.reader import LatentShards
from xar_scale.data.shards import DATASET_FILE, DatasetInfo, ShardInfo, ShardWriter, write_dataset_file
from xar_scale.errors import UsageError
from xar_scale.model.entities import create_layout
from xar_scale.presets import recipe
from xar_scale.tokenizers.kl16 import MAX_LOG_VARIANCE, MIN_LOG_VARIANCE

BATCH, REPEATS = 64, 5
SHAPE = (32, 16, 16)  # posterior mean and log variance of a 256 px image
INFO = DatasetInfo({"name": "none: random numbers"}, 0.2325, "moments", SHAPE, "float16", 1000, flipped=True)


def bench_loader(options: argparse.Namespace) -> None:
    """Time reading in batches of 64 from a warm cache, with all randomness: flip, posterior, times, noise, label drop."""
    if options.samples < 1:
        raise UsageError("--samples must be at least 1")
    torch.set_num_threads(1)
    values = merge(recipe("imagenet256_b"), {"data": {"path": str(options.data / "shards")}})
    config = Config.from_dict(values)
    _write_sets(options.data, options.samples)
    dataset = LatentDataset(LatentShards(options.data / "shards"), config, create_layout(config.model))
    print(f"{options.samples:,} samples of posterior moments (32, 16, 16) in float16, with mirrored ones; one process\n")
    print("| reader | samples/s | relative to MAR's |\n| --- | --- | --- |")
    readers = {
        "MAR's folder of .npz": lambda: _from_npz(options.data / "npz", config),
        "stock webdataset": lambda: _from_webdataset(options.data / "shards", config),
        "ours": lambda: _from_ours(dataset, options.samples),
    }
    base = 0.0
    for name, read in readers.items():
        rates = []
        for _ in range(1 + REPEATS):
            begun = time.perf_counter()
            count = sum(read())
            rates.append(count / (time.perf_counter() - begun))
        rate = statistics.median(rates[1:])
        base = base or rate
        print(f"| {name} | {rate:,.0f} | {rate / base:.1f} |", flush=True)


def bench_order(options: argparse.Namespace) -> None:
    """Time the start of one process: open the data set's description, build the order, locate a whole global batch."""
    if min(options.shards, options.samples_per_shard) < 1:
        raise UsageError("--shards and --samples-per-shard must be at least 1")
    shards = [ShardInfo(f"latents-{n:06d}", options.samples_per_shard, 2**30, n, n) for n in range(options.shards)]
    with TemporaryDirectory() as folder:
        write_dataset_file(Path(folder), INFO, shards)
        del shards
        before, begun = resident(), time.perf_counter()
        opened = LatentShards(folder)
    counts = [shard.samples for shard in opened.info.shards]
    order = SampleOrder(counts, seed=0, window=2048, global_batch=2048, lanes=128)
    ready = time.perf_counter() - begun
    begun = time.perf_counter()
    order.locate(range(2048))
    first = time.perf_counter() - begun
    middle = order.samples * 400 // 2048 * 2048
    begun = time.perf_counter()
    order.locate(range(middle, middle + 2048))
    found = time.perf_counter() - begun
    print(f"{order.samples:,} samples in {options.shards:,} shards, 128 lanes; one process")
    print(f"opened in {ready:.2f} s; a global batch of 2,048 located in {first:.2f} s, one of epoch 400 in {found:.2f} s")
    print(f"resident memory grew by {(resident() - before) / 1e6:.0f} MB")


def _write_sets(folder: Path, samples: int) -> None:
    """Write the same latents as our shards and as MAR's files, unless they exist."""
    if (folder / "shards" / DATASET_FILE).exists():
        if (there := LatentShards(folder / "shards").info.samples) != samples:
            raise UsageError(f"{folder} already holds {there} samples, not {samples}; choose another folder")
        return
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "shards", INFO, samples_per_shard=256) as writer:
        for number in range(samples):
            label = number % 1000
            latent, flipped = generator.standard_normal((2, *SHAPE), dtype=np.float32).astype(np.float16)
            writer.add(f"{number:07d}", label, latent, flipped)
            place = folder / "npz" / f"n{label:08d}"
            place.mkdir(parents=True, exist_ok=True)
            np.savez(place / f"{number:07d}.npz", moments=latent.astype(np.float32), moments_flip=flipped.astype(np.float32))


def _from_ours(dataset: LatentDataset, samples: int) -> Iterator[int]:
    for begin in range(0, samples, BATCH):
        yield len(dataset.__getitems__(range(begin, min(begin + BATCH, samples))).labels)


def _from_npz(folder: Path, config: Config) -> Iterator[int]:
    files = sorted(folder.glob("*/*.npz"))
    mixed = np.random.default_rng(0).permutation(len(files))
    for begin in range(0, len(files), BATCH):
        moments = []
        for at in mixed[begin : begin + BATCH]:
            with np.load(files[at]) as arrays:
                moments.append(torch.from_numpy(arrays["moments_flip" if np.random.rand() < 0.5 else "moments"]))
        yield _finish(torch.stack(moments), torch.zeros(len(moments), dtype=torch.int64), config)


def _from_webdataset(folder: Path, config: Config) -> Iterator[int]:
    """Stock webdataset as commonly used: shuffled in a buffer of a window's size."""
    import webdataset as wds

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    stream = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(config.data.window).decode()
    batch: list[Tensor] = []
    labels: list[int] = []
    for sample in stream:
        batch.append(torch.from_numpy(sample["flipped.npy" if np.random.rand() < 0.5 else "latent.npy"]).float())
        labels.append(sample["cls"])
        if len(batch) == BATCH:
            yield _finish(torch.stack(batch), torch.tensor(labels), config)
            batch, labels = [], []


def _finish(moments: Tensor, labels: Tensor, config: Config) -> int:
    """Finish a batch of another reader: posterior, times, noise and label drop, with torch's global generator."""
    mean, log_variance = moments.chunk(2, dim=1)
    latents = (
        mean + (0.5 * log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)).exp() * torch.randn_like(mean)
    ) * INFO.latent_scale
    noise, times = torch.randn(len(latents), 256, 16), torch.randn(len(latents), 4).sigmoid()
    labels = labels.where(torch.rand(len(labels)) >= config.train.label_drop, config.model.classes)
    assert noise.numel() == latents.numel() and len(times) == len(labels)
    return len(labels)
