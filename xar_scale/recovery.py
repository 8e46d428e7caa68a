"""Carries out what the guard decides: retries, other precisions, quarantine, roll backs.

Everything here is collective: all ranks call it together.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from xar_scale import dist
from xar_scale.checkpoint.load import load
from xar_scale.checkpoint.manifest import newest_valid, step_of
from xar_scale.checkpoint.store import Store
from xar_scale.config import Config
from xar_scale.data.loader import Batch, Place
from xar_scale.diagnosis import Activations, Watch
from xar_scale.ema import EMA
from xar_scale.engines import Engine, Verdict
from xar_scale.errors import DataError, NonFiniteError
from xar_scale.guard import Action, Bad, Decision, Event, Guard, GuardState, Rung
from xar_scale.precision import MODES
from xar_scale.reports import Report, names
from xar_scale.snapshots import Snapshots


class Resolution(NamedTuple):
    """What to do about a step: STEP with this verdict, SKIP, QUARANTINE or ROLL_BACK."""

    action: Action
    verdict: Verdict


class Recovery:
    """Climbs the guard's ladder. ``shards``: names of the data set's shards. ``splits``: the parts that each micro-batch is
    split into in the fallback precision."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        ema: EMA,
        shards: Sequence[str],
        store: Store,
        state: GuardState,
        splits: int = 1,
    ) -> None:
        self.config, self.engine, self.ema, self.shards, self.store = config, engine, ema, shards, store
        self.state, self.splits = state, splits
        self.precision = MODES[config.train.precision]
        self.guard = Guard(config.guard, self.precision)
        self.snapshots = Snapshots(engine, ema, config.guard)
        self.suspects: list[Place] = []  # the samples that the last decision was about

    def attempt(self, step: int, batches: Sequence[Batch], faults: int = 0, stop: bool = False) -> Verdict:
        """Attempt a step in the precision and with the loss scale of the guard's state."""
        mode = self._mode()
        splits = self.splits if self.state.lowered else 1
        if (mode, splits) != (self.engine.mode, self.engine.splits):
            dist.say(f"guard: step {step}: computing in {mode}" + (f", micro-batches in {splits} parts" if splits > 1 else ""))
            self.engine.set_precision(mode, splits)
        self.engine.loss_scale = self.state.scale if self.engine.precision.scaled else 1.0
        return self.engine.attempt(step, batches, faults, stop)

    def resolve(self, step: int, batches: Sequence[Batch], verdict: Verdict) -> Resolution:
        """Retry the step as long as the guard asks for it. Raises NonFiniteError beyond the ladder's last rung."""
        report: Report | None = None
        worth_keeping = False
        while True:
            event = self._event(step, batches, verdict)
            self.state, decision = self.guard.decide(self.state, event)
            if decision.reason:
                report = report or Report(self.config, self.engine, self.shards, self.store.run, step, batches)
                report.add(self.engine.mode, self.engine.loss_scale, event, decision)
                dist.say(f"guard: step {step}, {self.engine.mode}: {_seen(event)}: {decision.action.value}, {decision.reason}")
            # a halved loss scale is routine and gets no report
            worth_keeping |= self.state.rung is not Rung.FIRST or decision.action not in (Action.STEP, Action.RETRY)
            if decision.action is not Action.STEP:
                self.engine.discard()
            if decision.action is not Action.RETRY:
                break
            assert report is not None
            verdict = self._again(step, batches, report)
        if report is not None and worth_keeping:
            path, traced = report.write(self.store.newest_on_disk())
            dist.say(f"guard: step {step}: traced to {traced}" + (f"; report {path}" if path else ""))
            if decision.action is Action.STOP:
                raise self._stop(step, decision, traced, path)
        return Resolution(decision.action, verdict)

    def _again(self, step: int, batches: Sequence[Batch], report: Report) -> Verdict:
        """Retry the step under observation, unless only the loss scale changed.

        Observed blocks run uncompiled, and then round and drop differently. So with compiled blocks the step is first retried
        compiled, and observed only if that fails too.
        """
        if self.state.rung is Rung.FIRST:
            return self.attempt(step, batches)
        self.engine.shards_written(step - self.state.skipped)  # refresh the compute weights from the shards
        compiled = None
        if self.config.kernels.compile:
            compiled = self.attempt(step, batches)
            if not compiled.bad:
                return compiled
            self.engine.discard()
        with Watch(self.engine.model) as watch, Activations(self.engine.model) as activations:
            observed = self.attempt(step, batches)
        report.add_observations(watch, activations)
        return compiled or observed  # compiled is bad: its gradients are not used. Else observed, whose gradients are at hand

    def _event(self, step: int, batches: Sequence[Batch], verdict: Verdict) -> Event:
        if not verdict.bad or not self.config.guard.enabled:
            return Event(step, verdict.bad, verdict.loss, verdict.grad_norm)
        bad = verdict.bad
        if not bad & Bad.WEIGHTS and self.engine.ranks_with_bad_state(self.ema.tensors):
            bad |= Bad.MOMENTS
        self.suspects = self._suspects(batches, bad)
        return Event(step, bad, verdict.loss, verdict.grad_norm, len(self.suspects))

    def _suspects(self, batches: Sequence[Batch], bad: Bad) -> list[Place]:
        """Return all ranks' samples that may be to blame: non-finite samples, else those with a non-finite loss, else all."""
        rows = [~_finite_rows(batch) for batch in batches]
        if not bad & (Bad.INPUT | Bad.WEIGHTS | Bad.MOMENTS) and self.guard.on_last_rung(self.state):
            rows = [~torch.isfinite(self.engine.losses(batch)) for batch in batches]
        places = [batch.places[row.cpu()] for batch, row in zip(batches, rows, strict=True)]
        found = [place for of_rank in dist.gather_objects(torch.cat(places).tolist()) for place in of_rank]
        if not found:
            every = torch.cat([batch.places for batch in batches]).tolist()
            found = [place for of_rank in dist.gather_objects(every) for place in of_rank]
        return sorted({(shard, position) for shard, position in found})

    def check_start(self, step: int) -> None:
        """Before the first step: take a snapshot. Raises NonFiniteError if the run would start with a non-finite state."""
        if ranks := self.bad_ranks():
            where = f"on rank {', '.join(map(str, ranks))}"
            raise NonFiniteError(f"the initial weights, moments or EMA weights are not finite {where}: start from others")
        if self.config.guard.enabled and self.config.guard.snapshots:
            self.snapshots.take(step, self.state)

    def bad_ranks(self) -> list[int]:
        """Return the ranks whose weights, moments or EMA are not finite; none if the guard is off. Every rank calls this."""
        return self.engine.ranks_with_bad_state(self.ema.tensors) if self.config.guard.enabled else []

    def check_and_snapshot(self, done: int, *, checkpoint_due: bool) -> bool:
        """After ``done`` steps take the snapshot that is due. Returns False if the state is not finite.

        The state is checked only if a snapshot or a checkpoint is due.
        """
        due = self.snapshots.due(done)
        if (due or checkpoint_due) and (ranks := self.bad_ranks()):
            self.state, decision = self.guard.roll_back(self.state)
            traced = f"rank {', '.join(map(str, ranks))}"
            dist.say(f"guard: after step {done - 1}: {decision.action.value}, {decision.reason}; traced to {traced}")
            if decision.action is Action.STOP:
                raise self._stop(done - 1, decision, traced, None)
            return False
        if due:
            self.snapshots.take(done, self.state)
        return True

    def roll_back(self) -> int:
        """Restore the newest state that is known to be finite. Returns the step that the run continues from."""
        ring, newest = self.snapshots.ring, self.store.newest_on_disk()
        checkpoint = None
        if newest is not None and not (ring and ring[-1].step >= step_of(newest)):
            with contextlib.suppress(DataError):  # no valid one
                checkpoint = newest_valid(self.store.run)
        if ring and (checkpoint is None or ring[-1].step >= checkpoint.manifest.step):
            snapshot = self.snapshots.restore()
            step, guard, where = snapshot.step, snapshot.guard, "host memory"
        elif checkpoint is not None:
            load(checkpoint, self.engine, self.ema)
            step, guard, where = checkpoint.manifest.step, checkpoint.manifest.guard, str(checkpoint.path)
        else:
            reason = "the weights or moments are not finite, and there is no snapshot or checkpoint to roll back to"
            raise NonFiniteError(f"the run cannot continue: {reason}")
        self.state = replace(self.state, skipped=guard.skipped, losses=guard.losses, grad_norms=guard.grad_norms)
        dist.say(f"guard: rolled back to step {step}, from {where}")
        return step

    def _mode(self) -> str:
        return (self.precision.fallback if self.state.lowered else None) or self.config.train.precision

    def _stop(self, step: int, decision: Decision, traced: str, report: Path | None) -> NonFiniteError:
        newest = self.store.newest_on_disk()
        kept = f"the newest checkpoint, {newest}, is finite" if newest else "there is no checkpoint yet"
        shown = f"; xar-scale replay {report} reruns the step on one device" if report else ""
        return NonFiniteError(f"step {step} cannot be taken: {decision.reason}; traced to {traced}; {kept}{shown}")


def _finite_rows(batch: Batch) -> torch.Tensor:
    """Return which samples of a batch are finite (B,)."""
    parts = (torch.isfinite(tensor).flatten(1).all(dim=1) for tensor in (batch.latents, batch.noise, batch.t))
    return torch.stack(list(parts)).all(dim=0)


def _seen(event: Event) -> str:
    what = " and ".join(names(event.bad))
    return f"{what} not finite" if what else f"loss {event.loss:.4g}, gradient norm {event.grad_norm:.4g}"
