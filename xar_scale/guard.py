"""The guard: decides what to do with a step that is not fit to be taken. A state machine without I/O: events in, decisions out.

Every rank runs it on the same agreed events, so all ranks decide alike. While a step is not finite, it climbs this ladder:

1. fp16 only, where the loss is finite and gradients are not: halve the loss scale and retry the batch;
2. retry the same batch: if it is finite now, hardware is suspected;
3. retry it in TF32: if it is finite now, precision was to blame, and the run stays in TF32 for a while;
4. quarantine the batch's samples, within a budget, and retry the step with others;
5. where weights or moments are not finite: roll back to a finite state.

A non-finite attempt is never stepped. All rungs are bounded: beyond the last one the run stops.
"""

from dataclasses import asdict, dataclass, replace
from enum import Enum, IntFlag
from statistics import median
from typing import Any, NamedTuple

from typing_extensions import Self

from xar_scale.config import GuardConfig
from xar_scale.errors import DataError
from xar_scale.precision import Precision
from xar_scale.validation import STRICT, validated

FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24
SCALE_GROWS_AFTER = 2000  # steps, as in torch.amp.GradScaler
NORMAL_DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


class Bad(IntFlag):
    """What is not finite on at least one rank."""

    NOTHING = 0
    LOSS = 1
    GRADIENT = 2
    WEIGHTS = 4
    MOMENTS = 8
    INPUT = 16


class Event(NamedTuple):
    """One attempt at a step, as agreed by all ranks."""

    step: int
    bad: Bad
    loss: float
    grad_norm: float
    suspects: int = 0  # samples that a quarantine would take


class Action(Enum):
    STEP = "step"  # take the step
    SKIP = "skip"  # continue with the next step, without this one
    RETRY = "retry"  # attempt it again, in the state's precision and with its loss scale
    QUARANTINE = "quarantine"  # take the suspects out of the data, then attempt it again
    ROLL_BACK = "roll back"  # to an earlier, finite state
    STOP = "stop"


class Decision(NamedTuple):
    action: Action
    reason: str = ""  # for the log; empty if nothing happened


class Rung(Enum):
    """How far up the ladder the current step is."""

    FIRST = "first attempt"
    AGAIN = "the same again"
    TF32 = "in TF32"
    SPIKE = "in TF32 for a spike"


@dataclass(frozen=True)
class GuardState:
    """The guard's whole memory: plain values, kept in checkpoints."""

    __pydantic_config__ = STRICT  # applies to ``from_dict``; states that the guard itself makes are not validated

    rung: Rung = Rung.FIRST
    lowered: bool = False  # computing in the fallback of the run's precision
    held_until: int | None = None  # the step at which the run's precision returns; None: it does not
    scale: float = FIRST_SCALE
    halved: int = 0  # how often this step halved the scale
    steps_at_scale: int = 0
    holds: int = 0
    discarded: int = 0  # attempts that were not stepped
    skipped: int = 0  # steps
    transients: int = 0  # steps that were finite only on the second attempt
    quarantined: int = 0  # samples
    rollbacks: int = 0
    losses: tuple[float, ...] = ()  # of the last steps taken
    grad_norms: tuple[float, ...] = ()

    @property
    def counts(self) -> dict[str, float]:
        """The numbers that a log shows."""
        names = ("lowered", "scale", "discarded", "skipped", "transients", "quarantined", "rollbacks")
        return {f"guard_{name}": float(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values."""
        return {**asdict(self), "rung": self.rung.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the state of ``to_dict``. Raises DataError if a value is missing, unknown or of another type."""
        return validated(cls, values, DataError)


@dataclass(frozen=True)
class Guard:
    """The state machine. ``precision``: the run's own, which the guard may lower to its fallback."""

    settings: GuardConfig
    precision: Precision

    def decide(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        """Return the next state and what to do with an attempt."""
        if not self.settings.enabled:
            return state, Decision(Action.STEP)
        if event.bad:
            return self._not_finite(replace(state, discarded=state.discarded + 1), event)
        if state.rung in (Rung.FIRST, Rung.SPIKE) and self._spiked(state, event):
            return self._spike(state, event)
        return self._finite(state, event)

    def roll_back(self, state: GuardState) -> tuple[GuardState, Decision]:
        """Decide about weights or moments that are not finite. After a step that was taken there is no attempt to discard."""
        if state.rollbacks >= self.settings.max_rollbacks:
            return state, Decision(Action.STOP, f"already rolled back {state.rollbacks} times (guard.max_rollbacks)")
        back = replace(self._settled(state), rollbacks=state.rollbacks + 1)
        return back, Decision(Action.ROLL_BACK, "the weights or moments themselves are not finite")

    def on_last_rung(self, state: GuardState) -> bool:
        """Whether only a quarantine is left if this attempt fails too."""
        no_lower = state.lowered or not self.precision.fallback
        return state.rung in (Rung.TF32, Rung.SPIKE) or (state.rung is Rung.AGAIN and no_lower)

    def _finite(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        if state.rung in (Rung.TF32, Rung.SPIKE):
            state, reason = self._hold(state, event)
            return self._stepped(state, event), Decision(Action.STEP, reason)
        if state.rung is Rung.AGAIN:
            if state.transients >= self.settings.max_transients:
                times = f"already {state.transients} steps were finite only on a retry (guard.max_transients)"
                return state, Decision(Action.STOP, f"{times}: a hardware fault is suspected")
            state = replace(state, transients=state.transients + 1)
            return self._stepped(state, event), Decision(Action.STEP, "finite on a retry: a hardware fault is suspected")
        reason = f"loss scale {state.scale:g}" if state.halved else ""
        return self._stepped(state, event), Decision(Action.STEP, reason)

    def _hold(self, state: GuardState, event: Event) -> tuple[GuardState, str]:
        """Stay in TF32 for a while, twice as long at each relapse, and after ``max_holds`` permanently."""
        holds = state.holds + 1
        if holds > self.settings.max_holds:
            return replace(state, holds=holds, held_until=None), "precision was to blame: TF32 permanently"
        until = event.step + 1 + self.settings.hold_steps * 2 ** (holds - 1)
        return replace(state, holds=holds, held_until=until), f"precision was to blame: TF32 until step {until}"

    def _not_finite(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        if event.bad & (Bad.WEIGHTS | Bad.MOMENTS):
            return self.roll_back(state)
        if event.bad & Bad.INPUT:  # a retry cannot help
            return self._quarantine(state, event)
        scaled = self.precision.scaled and not state.lowered
        if scaled and event.bad == Bad.GRADIENT and state.scale > 1 and state.rung is Rung.FIRST:
            state = replace(state, scale=state.scale / 2, halved=state.halved + 1, steps_at_scale=0)
            return state, Decision(Action.RETRY, f"gradients overflow: loss scale {state.scale:g}")
        state = replace(state, scale=state.scale * 2**state.halved, halved=0)  # the scale was not to blame
        if state.rung is Rung.FIRST:
            return replace(state, rung=Rung.AGAIN), Decision(Action.RETRY, "the same batch in the same precision")
        if not self.on_last_rung(state):
            return replace(state, rung=Rung.TF32, lowered=True), Decision(Action.RETRY, "the same batch in TF32")
        return self._quarantine(state, event)

    def _quarantine(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        allowed = self.settings.max_quarantined
        if not 0 < event.suspects <= allowed - state.quarantined:
            reason = (
                f"samples to quarantine: {event.suspects}, guard.max_quarantined {allowed} leaves {allowed - state.quarantined}"
            )
            return state, Decision(Action.STOP, reason)
        state = replace(self._settled(state), quarantined=state.quarantined + event.suspects)
        why = "the inputs are not finite" if event.bad & Bad.INPUT else "no precision helps"
        return state, Decision(Action.QUARANTINE, f"{why}; samples quarantined: {event.suspects}")

    def _spike(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        if not state.lowered and self.precision.fallback:
            lowered = replace(state, rung=Rung.SPIKE, lowered=True, discarded=state.discarded + 1)
            return lowered, Decision(Action.RETRY, "a spike: the same batch in TF32")
        what = f"a spike (loss {event.loss:.4g}, gradient norm {event.grad_norm:.4g}) in TF32 too"
        if self.settings.on_spike == "take":
            return self._stepped(self._settled(state), event), Decision(Action.STEP, f"{what}: taken")
        skipped = replace(self._settled(state), discarded=state.discarded + 1, skipped=state.skipped + 1)
        return self._begin_next(skipped, event), Decision(Action.SKIP, f"{what}: skipped")

    def _spiked(self, state: GuardState, event: Event) -> bool:
        """Whether the loss or the gradient norm is more than ``guard.spike`` robust deviations above its recent median."""
        recent = ((state.losses, event.loss), (state.grad_norms, event.grad_norm))
        return bool(self.settings.spike) and len(state.losses) == self.settings.spike_window and any(
            value > (middle := median(past)) + self.settings.spike * _deviation(past, middle) for past, value in recent
        )  # fmt: skip

    def _settled(self, state: GuardState) -> GuardState:
        """Leave the ladder: return to the run's precision, unless TF32 is held."""
        held = state.lowered and (state.rung not in (Rung.TF32, Rung.SPIKE))
        return replace(state, rung=Rung.FIRST, lowered=held, scale=state.scale * 2**state.halved, halved=0)

    def _stepped(self, state: GuardState, event: Event) -> GuardState:
        """Return the state after a step was taken."""
        if self.settings.spike:
            keep = slice(-self.settings.spike_window, None)
            losses, norms = (*state.losses, event.loss)[keep], (*state.grad_norms, event.grad_norm)[keep]
            state = replace(state, losses=losses, grad_norms=norms)
        if self.precision.scaled and not state.lowered:
            state = replace(state, steps_at_scale=state.steps_at_scale + 1)
            if state.steps_at_scale == SCALE_GROWS_AFTER:
                state = replace(state, scale=min(state.scale * 2, LARGEST_SCALE), steps_at_scale=0)
        return self._begin_next(state, event)

    def _begin_next(self, state: GuardState, event: Event) -> GuardState:
        over = state.lowered and state.held_until is not None and event.step + 1 >= state.held_until
        return replace(state, rung=Rung.FIRST, halved=0, lowered=state.lowered and not over)


def _deviation(values: tuple[float, ...], middle: float) -> float:
    """Return the robust deviation, never zero: otherwise every step of a run whose loss stands still would be a spike."""
    return NORMAL_DEVIATION * median(abs(value - middle) for value in values) + 1e-3 * abs(middle)
