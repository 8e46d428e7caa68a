"""What a run begins with: its folder, its data, its checkpoint or first weights. All that can be refused is refused here."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from typing_extensions import Self

from xar_scale import dist
from xar_scale.checkpoint.initialise import Initialisation
from xar_scale.checkpoint.interop import open_source
from xar_scale.checkpoint.manifest import Checkpoint, checkpoint_paths, newest_valid, open_checkpoint, step_of, verify
from xar_scale.checkpoint.mirror import Check, Mirror, newest_valid_of
from xar_scale.checkpoint.reshard.writer import verify as verify_source
from xar_scale.checkpoint.store import Store
from xar_scale.config import Config
from xar_scale.data.loader import LatentDataset
from xar_scale.data.sources import Shards, open_shards
from xar_scale.errors import ConfigError, DataError, FileError, UsageError
from xar_scale.files import locked, write_atomically
from xar_scale.metrics import Metrics
from xar_scale.model.entities import create_layout
from xar_scale.model.xar import XAR, Weight, blank_weights, initial_weights
from xar_scale.stopping import Stops

CONFIG_FILE, LOCK_FILE = "config.yaml", "lock"
LOCK_WAIT_S = 100


class RunLock:
    """Rank 0's, until the context is left: no other process trains in ``run``. One that ends may take a while."""

    def __init__(self, run: Path, stops: Stops) -> None:
        self.run, self.stops, self._stack, self.taken = run, stops, ExitStack(), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _name(self, holder: str) -> None:
        with suppress(OSError):  # a full disk holds no name, and the lock all the same
            (self.run / LOCK_FILE).write_text(holder)

    def take(self) -> None:
        """Once is enough. Raises FileError where another process has it and keeps it, StoppedError or PreemptedError where this
        one is asked to stop meanwhile."""
        if self.taken or dist.rank() != 0:
            return
        self.taken, path, holder = True, self.run / LOCK_FILE, ""
        for second in range(LOCK_WAIT_S):
            try:
                attempt = ExitStack()
                if attempt.enter_context(locked(path)):
                    self._stack = attempt
                    attempt.callback(self._name, "")
                    self._name(_this_process())
                    return
                attempt.close()
                holder = path.read_text() or "another process"
            except OSError as error:
                dist.say(f"{self.run} cannot be locked, so that another job in it would go unnoticed: {error.strerror}")
                return
            if second == 0:
                dist.say(f"{self.run}: {holder} trains here; waiting for it to end")
            if self.stops.asked():
                raise self.stops.alone(f"stopped while {holder} trains in {self.run}: nothing is begun")
            time.sleep(1)
        raise FileError(f"{self.run}: {holder} still trains here; end it, or use another --run-dir")


def _this_process() -> str:
    """For whoever waits for it."""
    job = f" of SLURM's job {job}" if (job := os.environ.get("SLURM_JOB_ID")) else ""
    return f"process {os.getpid()} on {socket.gethostname()}{job}"


def open_run(config: Config, run: Path, store: Store, start: int, lock: RunLock) -> Metrics:
    """Rank 0's part of beginning: all that can fail for want of a writable folder fails here, before anything is trained."""
    run.mkdir(parents=True, exist_ok=True)
    unguarded = not lock.taken  # what the folder held was looked at when there was none
    lock.take()
    if unguarded and (later := [path.name for path in checkpoint_paths(run) if step_of(path) > start]):
        raise FileError(f"{run}: another job began it meanwhile, and wrote {later[-1]}; --resume auto goes on from there")
    store.open(start)
    write_atomically(run / CONFIG_FILE, config.to_yaml().encode())
    return Metrics(run, start, config.train.steps)


def open_data(config: Config) -> LatentDataset:
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


@contextmanager
def first_weights(model: XAR, config: Config, checkpoint: Checkpoint | None) -> Iterator[Iterator[Weight]]:
    """What the engine is built with: nothing of worth where a checkpoint is loaded next."""
    if checkpoint is not None:
        yield blank_weights(model)
    elif not config.train.init_from:
        yield initial_weights(model, config.train.seed)
    else:
        with dist.together(lambda: open_source(Path(config.train.init_from))) as source:
            if source.manifest is not None:
                dist.together(lambda: verify(source.path))
            else:
                dist.together(lambda: verify_source(source, lambda count: None) if dist.rank() == 0 else None)
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            found = dist.together(lambda: Initialisation(source, shapes, config.model))
            for line in found.report():
                dist.say(line)
            yield initial_weights(model, config.train.seed, found.value)


def mirror_of(run: Path, url: str) -> Mirror:
    """Raises ConfigError where it is none, or would write over the run itself."""
    mirror = Mirror(url)
    if mirror.is_run_folder(run):
        raise ConfigError(f"train.upload {url} is the run's own folder: its checkpoints would be removed for their copies")
    return mirror


def find_checkpoint(run: Path, resume: str, mirror: Mirror | None, check: Check) -> Checkpoint | None:
    """What the run goes on from; none: it begins. What ``check`` refuses, or a run that begins and cannot be copied, leaves
    nothing in ``run``.
    """
    if resume == "auto":
        checkpoint = newest_valid_of(run, mirror, check) if mirror else newest_valid(run)
    elif dist.on_rank_0(lambda: bool(checkpoint_paths(run) or (mirror and mirror.steps()))):
        advice = "use --resume auto to go on, or another --run-dir" if resume == "none" else "a new --run-dir is needed"
        where = f"{run} or its copy {mirror.url}" if mirror else run
        raise UsageError(f"{where} holds checkpoints already, --resume is {resume}: {advice}")
    else:
        checkpoint = None if resume == "none" else open_checkpoint(Path(resume))
    if checkpoint is not None:
        dist.together(lambda: check(checkpoint))
    if mirror is not None and (checkpoint is None or resume != "auto"):  # one that is under way does without a silent store
        dist.on_rank_0(mirror.check_writable)
    return checkpoint
