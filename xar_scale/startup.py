"""How a run starts: its folder, data, checkpoint or initial weights. Everything that can be refused is refused here."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from typing_extensions import Self

from xar_scale import dist
from xar_scale.checkpoint.initialise import SharedInitialisation
from xar_scale.checkpoint.manifest import Checkpoint, checkpoint_paths, newest_valid, open_checkpoint, step_of
from xar_scale.checkpoint.mirror import Check, Mirror, newest_valid_of
from xar_scale.checkpoint.store import Store
from xar_scale.config import Config
from xar_scale.data.loader import LatentDataset
from xar_scale.data.sources import Shards, open_shards
from xar_scale.errors import ConfigError, DataError, FileError, UsageError
from xar_scale.files import locked, write_atomically
from xar_scale.metrics import Metrics
from xar_scale.model.entities import create_layout
from xar_scale.model.xar import XAR, Weight, blank_weights, initial_weights
from xar_scale.stopping import StopRequests

CONFIG_FILE, LOCK_FILE = "config.yaml", "lock"
LOCK_WAIT_S = 100


class RunLock:
    """Rank 0's lock on ``run``, held until the context exits: no other process trains there. Waits for one that is exiting."""

    def __init__(self, run: Path, stops: StopRequests) -> None:
        self.run, self.stops, self._stack, self.taken = run, stops, ExitStack(), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _write_holder(self, holder: str) -> None:
        with suppress(OSError):  # the lock works without the name, on a full disk for instance
            (self.run / LOCK_FILE).write_text(holder)

    def take(self) -> None:
        """Take the lock; further calls do nothing. Raises FileError if another process keeps it, StoppedError or PreemptedError
        if this process is asked to stop while it waits."""
        if self.taken or dist.rank() != 0:
            return
        self.taken, path, holder = True, self.run / LOCK_FILE, ""
        for second in range(LOCK_WAIT_S):
            try:
                attempt = ExitStack()
                if attempt.enter_context(locked(path)):
                    self._stack = attempt
                    attempt.callback(self._write_holder, "")
                    self._write_holder(_this_process())
                    return
                attempt.close()
                holder = path.read_text() or "another process"
            except OSError as error:
                dist.say(f"{self.run} cannot be locked, so another job training in it would go unnoticed: {error.strerror}")
                return
            if second == 0:
                dist.say(f"{self.run}: {holder} is training here; waiting for it to exit")
            if self.stops.requested():
                raise self.stops.local_error(f"stopped while waiting for {holder} to release {self.run}: nothing was started")
            time.sleep(1)
        raise FileError(f"{self.run}: {holder} is still training here; stop it, or use another --run-dir")


def _this_process() -> str:
    """A description of this process for others that wait for its lock."""
    job = f" of SLURM's job {job}" if (job := os.environ.get("SLURM_JOB_ID")) else ""
    return f"process {os.getpid()} on {socket.gethostname()}{job}"


def open_run(config: Config, run: Path, store: Store, start: int, lock: RunLock) -> Metrics:
    """Rank 0's part of the start. Anything that fails because the folder is not writable fails here, before training."""
    run.mkdir(parents=True, exist_ok=True)
    unguarded = not lock.taken  # the folder did not exist when its contents were checked
    lock.take()
    if unguarded and (later := [path.name for path in checkpoint_paths(run) if step_of(path) > start]):
        raise FileError(f"{run}: meanwhile another job started this run and wrote {later[-1]}; --resume auto resumes from it")
    store.open(start)
    write_atomically(run / CONFIG_FILE, config.to_yaml().encode())
    return Metrics(run, start, config.train.steps)


def open_data(config: Config) -> LatentDataset:
    shards = open_shards(config)
    if dist.rank() == 0:  # one rank checks all shards; the others check those that they open
        _check_shards(shards, config.data.max_bad_samples)
    return LatentDataset(shards, config, create_layout(config.model))


def _check_shards(shards: Shards, allowed: int) -> None:
    """Raises DataError if missing or truncated shards hold more samples than ``allowed``."""
    samples = {shard.name: shard.samples for shard in shards.info.shards}
    lost = 0
    for fault in shards.faults():
        lost += samples[fault.shard]
        if lost > allowed:
            raise DataError(f"{fault.error} (bad samples: {lost}, data.max_bad_samples is {allowed})")
        dist.say(f"{fault.error}: its {samples[fault.shard]} samples will be skipped")


def same_kernels(kernels: str) -> str:
    """Return the description of this rank's kernels. Raises ConfigError if another rank's differ: nodes may differ in what is
    installed, and all would wait for the slowest one in every step."""
    first, *others = dist.gather_objects((kernels, socket.gethostname()))
    for rank, (its, host) in enumerate(others, start=1):
        if its != first[0]:
            raise ConfigError(
                f"rank 0 ({first[1]}) would use {first[0]}, rank {rank} ({host}) {its}: xar-scale doctor shows what a node "
                "lacks; or set kernels.attention and kernels.library"
            )
    return kernels


@contextmanager
def first_weights(model: XAR, config: Config, checkpoint: Checkpoint | None) -> Iterator[Iterator[Weight]]:
    """Yield the initial weights of the engine: zeros if a checkpoint is loaded next."""
    if checkpoint is not None:
        yield blank_weights(model)
    elif not config.train.init_from:
        yield initial_weights(model, config.train.seed)
    else:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        with SharedInitialisation(Path(config.train.init_from), shapes, config.model) as given:
            for line in given.report:
                dist.say(line)
            yield initial_weights(model, config.train.seed, given.take)


def mirror_of(run: Path, url: str) -> Mirror:
    """Return the mirror at ``url``. Raises ConfigError if the URL is invalid or is the run's own folder."""
    mirror = Mirror(url)
    if mirror.is_run_folder(run):
        raise ConfigError(f"train.upload {url} is the run's own folder: mirroring would delete its checkpoints")
    return mirror


def find_checkpoint(run: Path, resume: str, mirror: Mirror | None, check: Check) -> Checkpoint | None:
    """Return the checkpoint to resume from; None: a new run.

    Nothing is left in ``run`` if ``check`` refuses the checkpoint, or if a new run's ``mirror`` cannot be written to.
    """
    if resume == "auto":
        checkpoint = newest_valid_of(run, mirror, check) if mirror else newest_valid(run)
    elif dist.on_rank_0(lambda: bool(checkpoint_paths(run) or (mirror and mirror.steps()))):
        advice = "use --resume auto to resume, or another --run-dir" if resume == "none" else "use a new --run-dir"
        where = f"{run} or its copy {mirror.url}" if mirror else run
        raise UsageError(f"{where} already holds checkpoints, and --resume is {resume}: {advice}")
    else:
        checkpoint = None if resume == "none" else open_checkpoint(Path(resume))
    if checkpoint is not None:
        dist.on_all_ranks(lambda: check(checkpoint))
    if mirror is not None and (checkpoint is None or resume != "auto"):  # a resumed run continues without a reachable store
        dist.on_rank_0(mirror.check_writable)
    return checkpoint
