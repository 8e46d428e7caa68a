"""The training loop."""

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch

from xar_scale import dist
from xar_scale.checkpoint.store import (
    Checkpoint,
    Store,
    check_continues,
    checkpoint_paths,
    load,
    newest_valid,
    verify,
)
from xar_scale.config import Config, micro_batches
from xar_scale.data.faults import BadSamples, Fault
from xar_scale.data.loader import LatentDataset, RankNumbers, batches
from xar_scale.data.sources import Shards, open_shards
from xar_scale.ema import EMA
from xar_scale.engines import Engine, create_engine
from xar_scale.errors import DataError, NonFiniteError, UsageError
from xar_scale.files import write_atomically
from xar_scale.metrics import Metrics, memory_gb
from xar_scale.model.entities import create_layout
from xar_scale.model.flops import training_flops
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import blank_weights, initial_weights, meta_model
from xar_scale.optim import learning_rate
from xar_scale.precision import MODES

CONFIG_FILE = "config.yaml"


def train(config: Config, run: Path, resume: str = "auto") -> None:
    """Train to ``train.steps``, keeping checkpoints, metrics and the config in ``run``.

    ``resume``: "auto" goes on from the newest valid checkpoint of ``run`` if there is one; "none" demands that there is
    none; else the path of a checkpoint to start from. Every rank calls this.
    """
    device = dist.local_device()
    if config.train.engine != "single":
        dist.init(device)
    micro_batches(config.train, dist.world())  # refused before anything is built or written
    dataset = dist.together(lambda: _open_data(config))
    if len({*dist.gather_objects(dataset.shards.info.fingerprint)}) > 1:
        raise DataError(f"{config.data.path} is not the same data set on all ranks")
    checkpoint = _find_checkpoint(run, resume)
    if checkpoint is not None:
        dist.together(lambda: check_continues(checkpoint, config, dataset.shards.info))
    start = 0 if checkpoint is None else checkpoint.manifest.step
    bad = BadSamples(config.data.max_bad_samples, [] if checkpoint is None else checkpoint.manifest.bad_samples)

    model = meta_model(config.model)
    compute = MODES[config.train.precision].compute
    kernels = dist.together(lambda: model.use_kernels(config.kernels, device, compute, training=True))  # as each node has them
    apply_recompute(model.blocks, config.train.recompute)
    weights = initial_weights(model, config.train.seed) if checkpoint is None else blank_weights(model)
    engine = create_engine(model, weights, config, device)
    ema = EMA([shard.master for shard in engine.shards()], config.optim.ema_decay)
    if checkpoint is not None:
        load(checkpoint, engine, ema)
        dist.say(f"resumed from {checkpoint.path} at step {start}, epoch {checkpoint.manifest.position.epoch}")
    store = Store(run, config.train.keep_last)  # only now is the run's folder touched: nothing is left to refuse
    metrics = dist.together(lambda: _open_run(config, run, store, start) if dist.rank() == 0 else None)
    dist.say(
        f"{sum(shard.shape.numel() for shard in engine.shards()):,} parameters, {dataset.order.samples:,} samples, "
        f"{config.train.engine} on {dist.world()} x {device.type}, {config.train.precision}; {kernels}"
    )
    with metrics or nullcontext():
        newest = _loop(config, engine, ema, dataset, bad, store, start, metrics)
    dist.say(f"done: {config.train.steps} steps; checkpoint {newest or (checkpoint and checkpoint.path)}")


def _loop(
    config: Config,
    engine: Engine,
    ema: EMA,
    dataset: LatentDataset,
    bad: BadSamples,
    store: Store,
    start: int,
    metrics: Metrics | None,
) -> Path | None:
    """Steps ``start`` to ``train.steps``. Returns the last checkpoint written."""
    settings = config.train
    micro, passes = micro_batches(settings, dist.world())
    numbers = RankNumbers(
        start=start,
        steps=settings.steps,
        global_batch=settings.global_batch,
        micro_batch=micro,
        rank=dist.rank(),
        world=dist.world(),
    )
    stream = batches(dataset, numbers, engine.device)
    since, waited, logged = time.perf_counter(), 0.0, start
    newest: Path | None = None
    for step in range(start, settings.steps):
        engine.seed_step(step)
        loss = torch.zeros((), device=engine.device)
        faults = list[Fault]()
        for _ in range(passes):
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            faults += batch.faults
            loss += engine.forward_backward(batch) / passes
        news = bad.news(faults)
        verdict = engine.agree(loss, len(news))
        if not verdict.clean():  # the one moment of a step at which the host waits
            if verdict.faults.item():
                _account_for(news, bad)
            if not verdict.finite():
                engine.discard()
                raise NonFiniteError(
                    f"step {step}: loss {verdict.loss.item()}, gradient norm {verdict.grad_norm.item()}; "
                    f"stopped before the weights changed, checkpoints are in {store.folder}"
                )
        rate = learning_rate(config.optim, step, settings.steps)
        engine.step(rate, verdict)
        ema.update()

        done = step + 1
        if metrics is not None:
            metrics.advance(done)
            if done % settings.log_every == 0 or done == settings.steps:
                seconds = (time.perf_counter() - since) / (done - logged)
                values = {
                    "loss": verdict.loss.item(),
                    "lr": rate,
                    "grad_norm": verdict.grad_norm.item(),
                    "images_per_s": settings.global_batch / seconds,
                    "tflops_per_s": settings.global_batch / seconds * training_flops(config.model) / 1e12,
                    "step_s": seconds,
                    "data_wait_s": waited / (done - logged),
                    "memory_gb": memory_gb(engine.device),
                    "bad_samples": len(bad.known),
                    "epoch": done * settings.global_batch / dataset.order.samples,
                }
                metrics.log(done, values)
                since, waited, logged = time.perf_counter(), 0.0, done
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            position = dataset.order.position(done * settings.global_batch)
            newest = store.save(done, engine, ema, config, position, dataset.shards.info, bad)
    return newest


def _account_for(news: list[Fault], bad: BadSamples) -> None:
    """Put this rank's new faults together with all others', and say them. Raises, on every rank alike, what ends the run."""
    everywhere = [fault for of_rank in dist.gather_objects(news) for fault in of_rank]
    for what, count in Counter(str(fault.error) for fault in bad.add(everywhere)).items():
        dist.say(f"bad samples skipped, {count}: {what} ({len(bad.known)} so far, of data.max_bad_samples {bad.allowed})")


def _open_run(config: Config, run: Path, store: Store, start: int) -> Metrics:
    """Rank 0's part of beginning: all that can fail for want of a writable folder fails here, before anything is trained."""
    store.folder.mkdir(parents=True, exist_ok=True)
    store.set_aside_after(start)
    write_atomically(run / CONFIG_FILE, config.to_yaml().encode())
    return Metrics(run, start, config.train.steps)


def _open_data(config: Config) -> LatentDataset:
    shards = open_shards(config)
    if dist.rank() == 0:  # one rank looks at all shards; the others check what they open
        _look_at(shards, config.data.max_bad_samples)
    return LatentDataset(shards, config, create_layout(config.model))


def _look_at(shards: Shards, allowed: int) -> None:
    """Raises DataError where shards that are missing or cut hold more samples than the run may do without."""
    samples = {shard.name: shard.samples for shard in shards.info.shards}
    lost = 0
    for fault in shards.faults():
        lost += samples[fault.shard]
        if lost > allowed:
            raise DataError(f"{fault.error} (bad samples: {lost}, data.max_bad_samples is {allowed})")
        dist.say(f"{fault.error}: its {samples[fault.shard]} samples will be skipped")


def _find_checkpoint(run: Path, resume: str) -> Checkpoint | None:
    if resume == "auto":
        return newest_valid(run)
    if dist.on_rank_0(lambda: bool(checkpoint_paths(run))):
        advice = "use --resume auto to go on, or another --run-dir" if resume == "none" else "a new --run-dir is needed"
        raise UsageError(f"{run} holds checkpoints already, --resume is {resume}: {advice}")
    return None if resume == "none" else dist.together(lambda: verify(Path(resume)))
