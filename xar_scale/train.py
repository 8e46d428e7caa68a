"""The training loop."""

import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from xar_scale import dist
from xar_scale.checkpoint.load import check_resumable, load, state_kinds
from xar_scale.checkpoint.manifest import Manifest, step_of
from xar_scale.checkpoint.store import Store
from xar_scale.config import Config, micro_batches
from xar_scale.data.faults import BadSamples, Fault
from xar_scale.data.feed import Feed
from xar_scale.data.loader import LatentDataset
from xar_scale.diagnosis import Activations
from xar_scale.ema import EMA, POWER_KINDS, ema_widths
from xar_scale.engines import Engine, Verdict, create_engine
from xar_scale.errors import DataError, FileError, HangError, PreemptedError, StoppedError, XarScaleError
from xar_scale.evaluate.previews import Previews
from xar_scale.guard import Action, GuardState
from xar_scale.memory.fallback import fallback_splits
from xar_scale.metrics import Metrics, memory_gb
from xar_scale.model.flops import training_flops
from xar_scale.model.recompute import apply_recompute
from xar_scale.model.xar import meta_model
from xar_scale.optim import learning_rate
from xar_scale.precision import MODES
from xar_scale.recovery import Recovery
from xar_scale.startup import RunLock, find_checkpoint, first_weights, mirror_of, open_data, open_run, same_kernels
from xar_scale.stopping import StopRequests
from xar_scale.stragglers import ForwardTime, PassTime, Stragglers
from xar_scale.watchdog import Watchdog

STOP_PATIENCE_S = 10.0  # without data, after which a stop request no longer waits for them


def train(config: Config, run: Path, resume: str = "auto", stops: StopRequests | None = None) -> None:
    """Train to ``train.steps``, keeping checkpoints, metrics and the config in ``run``.

    ``resume``: "auto" resumes from the newest valid checkpoint of ``run`` if there is one; "none" requires that there is
    none; otherwise the path of a checkpoint to start from. Every rank calls this. Raises PreemptedError or StoppedError,
    after a last checkpoint, if any rank has a stop request in ``stops``.
    """
    stops = stops or StopRequests(run)
    device = dist.local_device()
    micro_batches(config.train, dist.world())  # refuse a bad batch before joining, building or writing anything
    if config.train.engine != "single" or dist.world() > 1:  # several ranks refuse ``single`` together
        dist.init(device)
    with RunLock(run, stops) as lock:
        # its contents must not change from here on. The others do not look: an NFS client would remember that it is not there
        dist.on_all_ranks(lambda: lock.take() if dist.rank() == 0 and run.is_dir() else None)
        _train(config, run, resume, stops, device, lock)


def _train(config: Config, run: Path, resume: str, stops: StopRequests, device: torch.device, lock: RunLock) -> None:
    dataset = dist.on_all_ranks(lambda: open_data(config))
    if len({*dist.gather_objects(dataset.shards.info.fingerprint)}) > 1:
        raise DataError(f"{config.data.path} is not the same data set on all ranks")
    mirror = dist.on_all_ranks(lambda: mirror_of(run, config.train.upload)) if config.train.upload else None
    checkpoint = find_checkpoint(run, resume, mirror, lambda found: check_resumable(found, config, dataset.shards.info))
    start = 0 if checkpoint is None else checkpoint.manifest.step
    bad = BadSamples(config.data.max_bad_samples, [] if checkpoint is None else checkpoint.manifest.bad_samples)

    model = meta_model(config.model)
    compute = MODES[config.train.precision].compute
    kernels = same_kernels(dist.on_all_ranks(lambda: model.use_kernels(config.kernels, device, compute, training=True)))
    apply_recompute(model.blocks, config.train.recompute, compiled=config.kernels.compile)
    with first_weights(model, config, checkpoint) as weights:
        engine = create_engine(model, weights, config, device)
    ema = EMA([shard.master for shard in engine.shards()], config.optim.ema_decay, ema_widths(config.optim))
    guard = GuardState()
    if checkpoint is not None:
        count = load(checkpoint, engine, ema)
        guard = checkpoint.manifest.guard
        if not config.guard.enabled or checkpoint.manifest.config["train"]["precision"] != config.train.precision:
            guard = replace(guard, lowered=False, held_until=None)  # it fell back from another precision, or the guard is off
        dataset.quarantine(dataset.places_of(checkpoint.manifest.quarantined))
        where = f"at step {start}, epoch {checkpoint.manifest.position.epoch}"
        if config.train.init_from:
            dist.say(f"train.init_from {config.train.init_from} is ignored: the run resumes from a checkpoint")
        dist.say(f"resumed from {checkpoint.path} {where}; rank 0 read {count:,} of {checkpoint.manifest.bytes:,} bytes")
    store = dist.on_all_ranks(lambda: Store(run, engine, ema, config.train, mirror))
    if checkpoint is not None:
        store.inherit(checkpoint.path)
    previews = Previews(config, run, engine, ema, dataset.shards.info)
    # the run folder is first written to here: everything that can be refused has been checked
    metrics = dist.on_all_ranks(lambda: open_run(config, run, store, start, lock) if dist.rank() == 0 else None)
    dist.say(
        f"{run}: {sum(shard.shape.numel() for shard in engine.shards()):,} parameters, {dataset.order.samples:,} samples, "
        f"{config.train.engine} on {dist.world()} x {device.type}, {config.train.precision}; {kernels}"
    )
    splits = fallback_splits(config, device)
    with metrics or nullcontext(), Watchdog(run, config.train) as watchdog:
        shards = [shard.name for shard in dataset.shards.info.shards]
        recovery = Recovery(config, engine, ema, shards, store, guard, splits)
        training = Training(config, engine, ema, dataset, bad, recovery, store, stops, watchdog, previews, metrics)
        training.run(start)
    dist.say(f"done: {config.train.steps} steps; checkpoint {store.newest or (checkpoint and checkpoint.path)}")


class Probes(NamedTuple):
    """Measurements of one attempt at a step."""

    computed: ForwardTime | PassTime
    activations: Activations | None = None


class Training:
    """A run in progress. ``metrics``: on rank 0 only."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        ema: EMA,
        dataset: LatentDataset,
        bad: BadSamples,
        recovery: Recovery,
        store: Store,
        stops: StopRequests,
        watchdog: Watchdog,
        previews: Previews,
        metrics: Metrics | None,
    ) -> None:
        self.config, self.engine, self.ema, self.dataset, self.bad = config, engine, ema, dataset, bad
        self.recovery, self.store, self.stops, self.metrics = recovery, store, stops, metrics
        self.watchdog, self.previews = watchdog, previews
        self.stragglers = Stragglers(dist.gather_objects(socket.gethostname()))
        self.ending: XarScaleError | None = None  # why the run stops before its last step
        self.feed = Feed(dataset, config.train, engine.device)

    def run(self, start: int) -> None:
        """Train from step ``start`` to ``train.steps``. Raises PreemptedError or StoppedError if the run stops earlier."""
        self._seek(start)
        self.recovery.check_start(start)
        step = start
        while step < self.config.train.steps and self.ending is None:
            self.watchdog.begin(step)
            step = self._advance(step)
        self.watchdog.pause()
        self.store.finish(stopped=self.ending is not None)
        self.stops.remove_file()
        if self.ending is not None:
            raise self.ending

    def _advance(self, step: int) -> int:
        """Attempt step ``step`` and act on the verdict. Return the step to run next."""
        done = step + 1
        last = done == self.config.train.steps
        logged = last or done % self.config.train.log_every == 0
        batches = self.feed.take(self._give_up_waiting)
        news = self.bad.new_faults(fault for batch in batches for fault in batch.faults)
        with self._probes(logged) as probes:
            verdict = self.recovery.attempt(step, batches, len(news), self.stops.requested())
        self.store.poll()
        if verdict.faults:
            try:
                _account_for(news, self.bad)
            except XarScaleError as error:  # raised on every rank, with the state of ``step`` intact
                kept = self._save_before_exit(step, error)
                if isinstance(error, (StoppedError, PreemptedError)):
                    self.ending = self.stops.error(f"stopped after step {step} of {self.config.train.steps}", saved=kept)
                    return step
                if kept:
                    self._finish_saving()
                raise
        if verdict.bad:
            self.watchdog.pause()  # retries and a report take longer than a step
        action, resolved = self.recovery.resolve(step, batches, verdict)
        if action is Action.QUARANTINE:
            self.dataset.quarantine(self.recovery.suspects)
            self.feed.seek(step)
            return step
        if action is Action.ROLL_BACK:
            return self._go_back()
        rate = learning_rate(self.config.optim, step, self.config.train.steps)
        if action is Action.STEP:
            self.engine.step(rate, resolved)
            self.ema.update(done - self.recovery.state.skipped)

        saved = self._due(done, stop=verdict.stop)
        if not self.recovery.check_and_snapshot(done, checkpoint_due=bool(saved)):
            return self._go_back()
        if saved:
            self.store.save(*(replace(self._manifest(done), kinds=kinds) for kinds in saved))
        if logged:
            self._log(done, resolved, rate, probes if resolved is verdict else None)
        if self.previews.due(done) and (last or not verdict.stop):
            self._preview(done)
        if self.metrics is not None:
            self.metrics.advance(done)
        if verdict.stop and not last:
            self.ending = self.stops.error(f"stopped after step {done} of {self.config.train.steps}")
        return done

    def _give_up_waiting(self, waited: float) -> XarScaleError | None:
        """Return the error to end the run with after ``waited`` seconds without data; None: wait on."""
        if waited >= STOP_PATIENCE_S and self.stops.requested():
            return self.stops.local_error("stopped while waiting for data")
        if self.watchdog.is_too_late(waited):
            return HangError(f"rank {dist.rank()} ({socket.gethostname()}) has waited {waited:.0f} s for data")
        return None

    def _save_before_exit(self, step: int, error: XarScaleError) -> bool:
        """Start to write a checkpoint of ``step``, if there is none and the state is finite: an error of the data loses no
        training. Return whether there is or will be one."""
        if isinstance(error, HangError):
            self.watchdog.begin(step)  # a time limit for the checkpoint as well: the storage of the run may hang too
        else:
            self.watchdog.pause()
        newest = self.store.newest_on_disk()
        if newest and step == step_of(newest):
            return True
        if step == 0 or self.recovery.bad_ranks():
            return False
        dist.say(f"{error}; saving a checkpoint of step {step} before the run exits")
        self.store.save(replace(self._manifest(step), kinds=state_kinds(self.ema)))
        return True

    def _finish_saving(self) -> None:
        try:
            self.store.finish(stopped=True, upload_attempts=1)  # the data's store may be the one that is unreachable
            if self.store.newest is not None:
                dist.say(f"checkpoint {self.store.newest}")
        except FileError as failed:  # not the error that the run exits with
            dist.say(str(failed))

    def _preview(self, done: int) -> None:
        self.watchdog.pause()
        self.store.newest_on_disk()  # before drawing, which may fail
        begun = time.perf_counter()
        preview = self.previews.take(done, done - self.recovery.state.skipped)
        if self.metrics is not None:
            self.metrics.show(done, preview.pictures, preview.numbers)
        seconds = time.perf_counter() - begun
        numbers = "".join(f", {name} {value:.4g}" for name, value in preview.numbers.items())
        dist.say(f"step {done}: preview images of the EMA weights{numbers} ({seconds:.0f} s)")
        self.since += seconds  # do not count it as step time

    def _due(self, done: int, *, stop: bool) -> list[tuple[str, ...]]:
        """Return the kinds of vectors of each folder to write after ``done`` steps. An EMA snapshot comes before a checkpoint,
        so that no run resumes from a checkpoint without the snapshot of that step. If it displaces a checkpoint that could not
        be written, a checkpoint is written with it."""
        checkpoints, snapshots = self.config.train.checkpoint_every, self.config.optim.ema_snapshots_every
        last = done == self.config.train.steps
        snapshot, checkpoint = (every is not None and (last or done % every == 0) for every in (snapshots, checkpoints))
        if snapshot or checkpoint or stop:
            self.watchdog.pause()  # no time limit on disk writes
        checkpoint |= stop or (snapshot and self.store.checkpoint_failed())
        return [kinds for due, kinds in ((snapshot, tuple(POWER_KINDS)), (checkpoint, state_kinds(self.ema))) if due]

    def _manifest(self, done: int) -> Manifest:
        consumed, info = done * self.config.train.global_batch, self.dataset.shards.info
        return Manifest(
            step=done,
            seed=self.config.train.seed,
            samples_consumed=consumed,
            position=self.dataset.order.position(consumed),
            bad_samples=sorted(self.bad.known),
            quarantined=sorted(self.dataset.names_of(self.dataset.quarantined)),
            guard=self.recovery.state,
            dataset={
                "samples": info.samples,
                "fingerprint": info.fingerprint,
                "tokenizer": info.tokenizer,
                "latent_scale": info.latent_scale,
            },
            world=dist.world(),
            engine=self.config.train.engine,
            precision=self.engine.mode,
            config=self.config.to_dict(),
            shapes={name: list(shape) for name, shape in self.engine.shapes.items()},
        )

    def _seek(self, step: int) -> None:
        self.feed.seek(step)
        self.since, self.logged, self.feed.waited = time.perf_counter(), step, 0.0

    def _go_back(self) -> int:
        self.watchdog.pause()
        step = self.recovery.roll_back()
        self.store.roll_back(step)
        self._seek(step)
        if self.metrics is not None:
            self.metrics.go_back(step)
        return step

    @contextmanager
    def _probes(self, logged: bool) -> Iterator[Probes | None]:
        """Yield probes for a step that will be logged, else None. A CUDA graph replay is only timed: hooks do not run in it."""
        model, device = self.engine.model, self.engine.device
        if not logged:
            yield None
        elif self.engine.replays_graphs:
            self.engine.micro_batch_context = passes = PassTime(device)
            yield Probes(passes)
            self.engine.micro_batch_context = nullcontext()
        else:
            with Activations(model) as activations, ForwardTime(model, device, self.config.kernels.compile) as forward:
                yield Probes(forward, activations)

    def _log(self, done: int, verdict: Verdict, rate: float, probes: Probes | None) -> None:
        """``probes``: None unless the step was taken at the first attempt."""
        settings, steps, state = self.config.train, done - self.logged, self.recovery.state
        seconds, waited = (time.perf_counter() - self.since) / steps, self.feed.waited / steps
        computed = probes.computed.seconds if probes else 0.0
        activations = probes.activations.largest.values() if probes and probes.activations else [0.0]
        everywhere = dist.gather_floats(waited, computed, dist.largest(activations))
        waits, computing, largest = zip(*everywhere, strict=True)
        values = {
            "loss": verdict.loss,
            "lr": rate,
            "grad_norm": verdict.grad_norm,
            "images_per_s": settings.global_batch / seconds,
            "tflops_per_s": settings.global_batch / seconds * training_flops(self.config.model) / 1e12,
            "step_s": seconds,
            "data_wait_s": max(waits),
            "memory_gb": memory_gb(self.engine.device),
            "bad_samples": len(self.bad.known),
            "epoch": done * settings.global_batch / self.dataset.order.samples,
            "precision": self.engine.mode,
            "checkpoint_stall_s": self.store.stall_s,
            **state.counts,
        }
        if probes is not None:
            self.stragglers.compare(computing, waits, seconds)
            values["forward_s"] = [float(f"{of_rank:.4g}") for of_rank in computing]  # of hundreds of ranks, in every line
            if probes.activations is not None:
                values["largest_activation"] = dist.largest(largest)
        if self.metrics is not None:
            self.metrics.log(done, values)
        self.since, self.logged, self.feed.waited, self.store.stall_s = time.perf_counter(), done, 0.0, 0.0


def _account_for(news: list[Fault], bad: BadSamples) -> None:
    """Merge the new faults of all ranks and print them. Raises, on every rank alike, the error that ends the run, if any."""
    everywhere = [fault for of_rank in dist.gather_objects(news) for fault in of_rank]
    for what, count in Counter(str(fault.error) for fault in bad.add(everywhere)).items():
        dist.say(f"skipped {count} bad samples: {what} ({len(bad.known)} so far, data.max_bad_samples {bad.allowed})")
