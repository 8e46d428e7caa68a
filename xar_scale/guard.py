"""The guard: what becomes of a step that is not fit to be taken. A state machine without I/O: events in, decisions out.

Every rank runs it on the same events, which the ranks have agreed on, and so decides as all others do. The ladder, one rung
after another for as long as a step is not finite:

1. fp16 only, where the loss is finite and gradients are not: halve the loss scale and attempt the batch again;
2. attempt the same batch again: if it is finite now, the device is suspected;
3. attempt it in TF32: if it is finite now, precision was to blame, and the run stays in TF32 for a while;
4. take the batch's samples out of the data, within a budget, and attempt the step with others;
5. weights or moments that are not finite: back to a state that is.

An attempt that is not finite is never stepped. All rungs are bounded: beyond the last the run stops.
"""

from dataclasses import asdict, dataclass, replace
from enum import Enum, IntFlag
from statistics import median
from typing import Any, NamedTuple

from typing_extensions import Self

from xar_scale.config import STRICT, GuardConfig, validated
from xar_scale.errors import DataError
from xar_scale.precision import Precision

FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24
SCALE_GROWS_AFTER = 2000  # steps, as torch.amp.GradScaler has it
NORMAL_DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


class Bad(IntFlag):
    """What is not finite, on any rank."""

    NOTHING = 0
    LOSS = 1
    GRADIENT = 2
    WEIGHTS = 4
    MOMENTS = 8
    INPUT = 16


class Event(NamedTuple):
    """One attempt at a step, as all ranks know it."""

    step: int
    bad: Bad
    loss: float
    grad_norm: float
    suspects: int = 0  # samples that would be taken out of the data, if it came to that


class Action(Enum):
    STEP = "step"  # take it
    SKIP = "skip"  # go on to the next one without it
    RETRY = "retry"  # attempt it again, in the state's precision and with its loss scale
    QUARANTINE = "quarantine"  # take the suspects out of the data, then attempt it again
    ROLL_BACK = "roll back"  # to an earlier state that is finite
    STOP = "stop"


class Decision(NamedTuple):
    action: Action
    reason: str = ""  # for the log; empty where nothing happened


class Rung(Enum):
    """How far up the ladder the present step is."""

    FIRST = "first attempt"
    AGAIN = "the same again"
    TF32 = "in TF32"
    SPIKE = "in TF32 for a spike"


@dataclass(frozen=True)
class GuardState:
    """All that the guard remembers; plain values, kept in checkpoints."""

    __pydantic_config__ = STRICT  # of ``from_dict``; what the guard itself makes is not checked

    rung: Rung = Rung.FIRST
    lowered: bool = False  # computing in the fallback of the run's precision
    held_until: int | None = None  # the step at which the run's precision returns; none: it does not
    scale: float = FIRST_SCALE
    halved: int = 0  # times that this step halved the scale
    steps_at_scale: int = 0
    holds: int = 0
    discarded: int = 0  # attempts that were not stepped
    skipped: int = 0  # steps that were gone without
    transients: int = 0
    quarantined: int = 0  # samples
    rollbacks: int = 0
    losses: tuple[float, ...] = ()  # of the last steps taken
    grad_norms: tuple[float, ...] = ()

    @property
    def counts(self) -> dict[str, float]:
        """What a log shows of it."""
        names = ("lowered", "scale", "discarded", "skipped", "transients", "quarantined", "rollbacks")
        return {f"guard_{name}": float(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "rung": self.rung.value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises DataError where a value is missing, unknown or of another type."""
        return validated(cls, values, DataError)


@dataclass(frozen=True)
class Guard:
    """``precision``: of the run, where the guard has not lowered it."""

    settings: GuardConfig
    precision: Precision

    def decide(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        """What to do with an attempt, and the state that whatever is done next begins in."""
        if not self.settings.enabled:
            return state, Decision(Action.STEP)
        if event.bad:
            return self._not_finite(replace(state, discarded=state.discarded + 1), event)
        if state.rung in (Rung.FIRST, Rung.SPIKE) and self._spiked(state, event):
            return self._spike(state, event)
        return self._finite(state, event)

    def on_last_rung(self, state: GuardState) -> bool:
        """Whether, should this attempt fail too, nothing is left but to take samples out."""
        no_lower = state.lowered or not self.precision.fallback
        return state.rung in (Rung.TF32, Rung.SPIKE) or (state.rung is Rung.AGAIN and no_lower)

    def _finite(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        if state.rung in (Rung.TF32, Rung.SPIKE):
            state, reason = self._hold(state, event)
            return self._stepped(state, event), Decision(Action.STEP, reason)
        if state.rung is Rung.AGAIN:
            if state.transients >= self.settings.max_transients:
                reason = f"attempts differed {state.transients} times already (guard.max_transients): a device is suspected"
                return state, Decision(Action.STOP, reason)
            state = replace(state, transients=state.transients + 1)
            return self._stepped(state, event), Decision(Action.STEP, "finite at the second attempt: a device is suspected")
        reason = f"loss scale {state.scale:g}" if state.halved else ""
        return self._stepped(state, event), Decision(Action.STEP, reason)

    def _hold(self, state: GuardState, event: Event) -> tuple[GuardState, str]:
        """Stay in TF32: a while, twice as long at each relapse, at last for good."""
        holds = state.holds + 1
        if holds > self.settings.max_holds:
            return replace(state, holds=holds, held_until=None), "precision was to blame: TF32 for good"
        until = event.step + 1 + self.settings.hold_steps * 2 ** (holds - 1)
        return replace(state, holds=holds, held_until=until), f"precision was to blame: TF32 until step {until}"

    def _not_finite(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        if event.bad & (Bad.WEIGHTS | Bad.MOMENTS):
            if state.rollbacks >= self.settings.max_rollbacks:
                return state, Decision(Action.STOP, f"rolled back {state.rollbacks} times already (guard.max_rollbacks)")
            back = replace(self._settled(state), rollbacks=state.rollbacks + 1)
            return back, Decision(Action.ROLL_BACK, "the weights or moments themselves are not finite")
        if event.bad & Bad.INPUT:  # no precision helps
            return self._quarantine(state, event)
        scaled = self.precision.scaled and not state.lowered
        if scaled and event.bad == Bad.GRADIENT and state.scale > 1 and state.rung is Rung.FIRST:
            state = replace(state, scale=state.scale / 2, halved=state.halved + 1, steps_at_scale=0)
            return state, Decision(Action.RETRY, f"gradients overflow: loss scale {state.scale:g}")
        state = replace(state, scale=state.scale * 2**state.halved, halved=0)  # it was not the scale
        if state.rung is Rung.FIRST:
            return replace(state, rung=Rung.AGAIN), Decision(Action.RETRY, "the same again")
        if not self.on_last_rung(state):
            return replace(state, rung=Rung.TF32, lowered=True), Decision(Action.RETRY, "the same in TF32")
        return self._quarantine(state, event)

    def _quarantine(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        allowed = self.settings.max_quarantined
        if not 0 < event.suspects <= allowed - state.quarantined:
            reason = (
                f"samples to take out: {event.suspects}, left of guard.max_quarantined {allowed}: {allowed - state.quarantined}"
            )
            return state, Decision(Action.STOP, reason)
        state = replace(self._settled(state), quarantined=state.quarantined + event.suspects)
        return state, Decision(Action.QUARANTINE, f"no precision helps; samples taken out: {event.suspects}")

    def _spike(self, state: GuardState, event: Event) -> tuple[GuardState, Decision]:
        if not state.lowered and self.precision.fallback:
            lowered = replace(state, rung=Rung.SPIKE, lowered=True, discarded=state.discarded + 1)
            return lowered, Decision(Action.RETRY, "a spike: the same in TF32")
        what = f"a spike (loss {event.loss:.4g}, gradient norm {event.grad_norm:.4g}) in TF32 too"
        if self.settings.on_spike == "take":
            return self._stepped(self._settled(state), event), Decision(Action.STEP, f"{what}: taken")
        skipped = replace(self._settled(state), discarded=state.discarded + 1, skipped=state.skipped + 1)
        return self._begin_next(skipped, event), Decision(Action.SKIP, f"{what}: gone without")

    def _spiked(self, state: GuardState, event: Event) -> bool:
        """Whether loss or gradient norm lie beyond ``guard.spike`` robust deviations above their recent median."""
        recent = ((state.losses, event.loss), (state.grad_norms, event.grad_norm))
        return bool(self.settings.spike) and len(state.losses) == self.settings.spike_window and any(
            value > (middle := median(past)) + self.settings.spike * _deviation(past, middle) for past, value in recent
        )  # fmt: skip

    def _settled(self, state: GuardState) -> GuardState:
        """The step's climb is over: what is not held returns to the run's precision."""
        held = state.lowered and (state.rung not in (Rung.TF32, Rung.SPIKE))
        return replace(state, rung=Rung.FIRST, lowered=held, scale=state.scale * 2**state.halved, halved=0)

    def _stepped(self, state: GuardState, event: Event) -> GuardState:
        """A step was taken: what the next one begins with."""
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
    """Robust, and never nothing: of a run that stands still every step would be a spike."""
    return NORMAL_DEVIATION * median(abs(value - middle) for value in values) + 1e-3 * abs(middle)
