"""A training step and sampling, against a fixed baseline of PyTorch layers and against the published code."""

import argparse
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xar_scale import dist
from xar_scale.bench.memory import peak_memory
from xar_scale.bench.published import Published
from xar_scale.bench.record import BASELINE, OURS, PUBLISHED, SLOWER, Record, check_same_work, compare, markdown, read_record
from xar_scale.bench.setup import config_with, engine_and_ema
from xar_scale.bench.timing import WARM_UP, in_turns, median_ms
from xar_scale.bench.trace import trace
from xar_scale.config import Config, read_settings
from xar_scale.data.feed import Feed
from xar_scale.errors import UsageError
from xar_scale.evaluate.generate import prepare
from xar_scale.files import make_folder
from xar_scale.model.flops import training_flops
from xar_scale.model.xar import XAR, Weight, initial_weights, meta_model
from xar_scale.plan.hardware import GPUS
from xar_scale.precision import MODES, apply_matmul_mode, autocast
from xar_scale.presets import model_values
from xar_scale.sampler import sample
from xar_scale.startup import open_data

BASELINE_LAYERS = 2
PUBLISHED_GRID = 16
CHANNELS, CLASSES = 16, 1000  # of the recipe, which are the published code's
SQUARE = 4096  # size of the matrix product that measures the machine's peak


def bench_step(options: argparse.Namespace) -> None:
    """Time a training step: synthetic data through the loader, forward, backward, the guard's verdict, optimizer, EMA."""
    device = dist.local_device()
    if options.engine != "single":
        dist.init(device)
    settings = _settings(options, "engine", "dropout", "recompute", "attention", "compile")
    if options.engine == "deepspeed":
        settings["zero"] = read_settings(options.ds_config).get("zero_optimization")
    earlier = _earlier(options, "step", settings)
    apply_matmul_mode(options.precision)
    config = _config(options)
    published, apart = _published(options, device, lambda: _published_step(options, device))
    dataset = open_data(config)
    before = peak_memory(device, reset=True)
    engine, ema, kernels = engine_and_ema(config, lambda model: _random_weights(model, device), device)
    feed = Feed(dataset, config.train, device)
    feed.seek(0)

    def ours() -> None:
        engine.step(1e-4, engine.attempt(0, feed.take()))
        ema.update(1)

    for _ in range(WARM_UP + 1):
        ours()
    memory = peak_memory(device) - before
    works: Works = {OURS: ours, BASELINE: _baseline(options, device, train=True)}
    works |= published
    feed.waited = 0.0
    seconds = in_turns(works, device, options.repeats) | apart
    waited = feed.waited / (WARM_UP + options.repeats)
    found = trace(ours, device, options.trace if dist.rank() == 0 else None)
    record = Record(
        "step",
        settings,
        images=config.train.global_batch,
        seconds={name: [dist.max_over_ranks(each) for each in taken] for name, taken in seconds.items()},
        flops=float(training_flops(config.model) * options.batch),
        peak=_peak(device, options.precision),
        memory_gb=dist.max_over_ranks(memory) / 1e9,
        data_wait_s=dist.max_over_ranks(waited),
        communication_s=found.communication_s,  # rank 0's
        hidden_s=found.hidden_s,
    )
    if dist.rank() == 0:
        print(f"{options.model}, {dist.world()} x {options.batch} images, {options.precision}, {options.engine}; {kernels}\n")
        _show(record, options, earlier)
        print("\n| longest | ms | calls |\n| --- | --- | --- |")
        for name, ms, calls in found.top:
            print(f"| {name} | {ms:.1f} | {calls} |")


def bench_sample(options: argparse.Namespace) -> None:
    """Time sampling latents of ``--batch`` images with the published sampler and guidance."""
    if dist.world() > 1:
        raise UsageError(f"sampling is timed in one process, not {dist.world()}")
    device = dist.local_device()
    settings = _settings(options, "steps", "guidance", "compile")
    earlier = _earlier(options, "sample", settings)
    apply_matmul_mode(options.precision)
    compute = MODES[options.precision].compute
    labels = [7 * image % CLASSES for image in range(options.batch)]
    published, apart = _published(options, device, lambda: _published_sampling(options, labels, device))
    before = peak_memory(device, reset=True)
    model = meta_model(_config(options).model).eval()
    for weight in _random_weights(model, device):
        weight.place(device)
    kernels = model.use_kernels(_config(options).kernels, device, compute, training=False)
    prepare(model, device, compute, compiled=options.compile)

    def ours() -> None:
        with autocast(device, compute):
            sample(model, labels, steps=options.steps, guidance=options.guidance)

    ours()
    memory = peak_memory(device) - before
    works: Works = {OURS: ours, BASELINE: _baseline(options, device, train=False)}
    works |= published
    seconds = in_turns(works, device, options.repeats) | apart
    record = Record("sample", settings, images=options.batch, seconds=seconds, memory_gb=memory / 1e9)
    how = f"{options.steps} steps, guidance {options.guidance}, {options.precision}"
    print(f"{options.model}, {options.batch} images in {how}; {kernels}\n")
    _show(record, options, earlier)


Works = dict[str, Callable[[], Any]]


def _published(
    options: argparse.Namespace, device: torch.device, make: Callable[[], Callable[[], Any]]
) -> tuple[Works, dict[str, list[float]]]:
    """Return the published code's work, to take turns with ours. On a GPU, whose memory may not suffice for both, time it now
    and return its seconds instead."""
    if not options.reference:
        return {}, {}
    works = {PUBLISHED: make()}
    if device.type != "cuda":
        return works, {}
    seconds = in_turns(works, device, options.repeats)
    works.clear()
    gc.collect()
    return {}, seconds


def _published_step(options: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    published = Published(options.reference, options.model, options.dropout, device)
    latents = torch.randn(options.batch, CHANNELS, options.grid, options.grid, device=device)
    labels = torch.arange(options.batch, device=device) % CLASSES
    return lambda: published.step(latents, labels.float(), MODES[options.precision].compute)


def _published_sampling(options: argparse.Namespace, labels: list[int], device: torch.device) -> Callable[[], Any]:
    published = Published(options.reference, options.model, 0.0, device)
    return lambda: published.sample(labels, options.steps, options.guidance, MODES[options.precision].compute)


def _random_weights(model: XAR, device: torch.device) -> Iterator[Weight]:
    """Yield initial weights with matrices drawn on the device: one core takes a quarter of a minute for a billion numbers."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def drawn(name: str) -> Tensor | None:
        return torch.empty(shapes[name], device=device).normal_(std=0.02) if len(shapes[name]) > 1 else None

    return initial_weights(model, 0, drawn)


def _earlier(options: argparse.Namespace, what: str, settings: dict[str, Any]) -> Record | None:
    """Check the options and output folders, and return the record to compare with. It is read before the minutes of work, and
    before --json may overwrite the same file. Raises UsageError if it is not of the same work."""
    for file in filter(None, (options.json, getattr(options, "trace", None))):
        make_folder(file.parent)
    if options.repeats < 1:
        raise UsageError("--repeats must be at least 1")
    if options.reference and dist.world() > 1:
        raise UsageError(f"--reference is timed in one process, not {dist.world()}")
    if options.reference and options.grid != PUBLISHED_GRID:
        raise UsageError(
            f"the published code takes {PUBLISHED_GRID}x{PUBLISHED_GRID} tokens, not {options.grid}x{options.grid}"
        )
    if not options.compare:
        return None
    earlier = read_record(options.compare)
    check_same_work(what, settings, earlier)
    return earlier


def _config(options: argparse.Namespace) -> Config:
    """Return imagenet256_h's config with the requested model and sizes, on synthetic latents."""
    kernels: dict[str, Any] = {}
    train: dict[str, Any] = {"global_batch": dist.world() * options.batch, "precision": options.precision}
    model: dict[str, Any] = {"grid": [options.grid] * 2}
    if hasattr(options, "engine"):
        train |= {"engine": options.engine, "recompute": options.recompute, "ds_config": options.ds_config}
        model["dropout"] = options.dropout
        kernels = {"attention": options.attention, "compile": options.compile}
    workers = 4 if dist.local_device().type == "cuda" else 0  # on a CPU they would compete with compute
    data = {"path": "synthetic:4096", "workers": workers}
    return config_with(options.model, model=model, train=train, kernels=kernels, data=data)


def _settings(options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Return the settings that a comparable record must share."""
    named = {name: getattr(options, name) for name in ("model", "grid", "batch", "precision", *more)}
    device = dist.local_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return named | {"ranks": dist.world(), "device": name, "threads": torch.get_num_threads()}


def _show(record: Record, options: argparse.Namespace, earlier: Record | None) -> None:
    print(f"{record.machine}\n\n{markdown(record)}")
    if options.json:
        record.write(options.json)
    if earlier is not None:
        print(f"\n{compare(record, earlier)}")


def _baseline(options: argparse.Namespace, device: torch.device, *, train: bool) -> Callable[[], None]:
    """Return work of PyTorch's own encoder with the model's width, heads and tokens, and two layers. It does not change with
    our code, and slows down with the machine."""
    sizes, compute = model_values(options.model), MODES[options.precision].compute
    width = sizes["width"]
    layer = nn.TransformerEncoderLayer(width, sizes["heads"], 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    network = nn.TransformerEncoder(layer, BASELINE_LAYERS, enable_nested_tensor=False).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
    x = torch.randn(options.batch, options.grid**2, width, device=device)

    def work() -> None:
        with autocast(device, compute), torch.set_grad_enabled(train):
            y = network(x)  # always in training mode: evaluation would use another kernel
        if train:
            F.mse_loss(y.float(), x).backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def _peak(device: torch.device, precision: str) -> float:
    """Peak FLOP/s: the GPU's data sheet; for a CPU or an unknown GPU, what a large matrix product reaches here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower()
        if known := next((gpu for key, gpu in GPUS.items() if key in name and not {"pcie", "nvl"} & {*name.split()}), None):
            return known.peak(precision)
    apply_matmul_mode(precision)
    rows = SQUARE if device.type == "cuda" else SQUARE // 4
    matrix = torch.randn(rows, rows, device=device, dtype=MODES[precision].compute)
    return 2 * rows**3 / (median_ms(lambda: matrix @ matrix, device) / 1e3)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both commands."""
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference", type=Path, help="checkout of the published code, timed in turns with ours")
    parser.add_argument("--json", type=Path, help="file for the record")
    parser.add_argument(
        "--compare",
        type=Path,
        help=f"a record; exit with code 1 if our time relative to the baseline grew by more than {SLOWER - 1:.0%}%",
    )
