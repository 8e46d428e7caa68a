"""The guard's decisions: each rung by example, and properties of any course of events by hypothesis."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xar_scale.config import GuardConfig
from xar_scale.errors import DataError
from xar_scale.guard import FIRST_SCALE, LARGEST_SCALE, SCALE_GROWS_AFTER, Action, Bad, Event, Guard, GuardState, Rung
from xar_scale.precision import MODES

NAN = math.nan
CONFIG = GuardConfig(hold_steps=4, max_holds=2, max_transients=2, max_quarantined=20, max_rollbacks=2)


def guard(mode: str = "bf16", **changes) -> Guard:
    values = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | changes
    return Guard(GuardConfig(**values), MODES[mode])


def event(step: int = 0, bad: Bad = Bad.NOTHING, loss: float = 1.0, norm: float = 1.0, suspects: int = 8) -> Event:
    return Event(step, bad, NAN if bad & Bad.LOSS else loss, NAN if bad else norm, suspects if bad else 0)


FINE, NOT_FINITE = event(), event(bad=Bad.LOSS | Bad.GRADIENT)


def course(machine: Guard, *events: Event, state: GuardState | None = None) -> tuple[GuardState, list[Action]]:
    """Return the state after ``events`` and the decision at each."""
    state, actions = state or GuardState(), []
    for at in events:
        state, decision = machine.decide(state, at)
        actions.append(decision.action)
    return state, actions


def test_a_finite_step_is_taken_and_nothing_is_remembered():
    state, decision = guard().decide(GuardState(), FINE)
    assert (state, *decision) == (GuardState(), Action.STEP, "")


def test_a_step_that_is_finite_on_a_retry_is_taken_and_counted():
    state, actions = course(guard(), NOT_FINITE, FINE)
    assert actions == [Action.RETRY, Action.STEP]
    assert state == GuardState(transients=1, discarded=1)


def test_too_many_transients_end_the_run():
    _, actions = course(guard(), *[NOT_FINITE, FINE] * 3)
    assert actions[-2:] == [Action.RETRY, Action.STOP] and Action.STOP not in actions[:-1]


def test_a_step_finite_only_in_tf32_is_taken_and_tf32_is_held():
    machine = guard()
    state, actions = course(machine, event(7, Bad.LOSS), event(7, Bad.LOSS), event(7))
    assert actions == [Action.RETRY, Action.RETRY, Action.STEP]
    assert state.lowered and state.rung is Rung.FIRST and state.holds == 1
    lowered = [state.lowered]
    for step in range(8, 13):
        state, actions = course(machine, event(step), state=state)
        assert actions == [Action.STEP]
        lowered.append(state.lowered)
    assert lowered == [True] * 4 + [False] * 2  # steps 8 to 11 in TF32


def relapse(machine: Guard, state: GuardState, step: int) -> GuardState:
    state, actions = course(machine, event(step, Bad.LOSS), event(step, Bad.LOSS), event(step), state=state)
    assert actions == [Action.RETRY, Action.RETRY, Action.STEP]
    return state


def steps_held(machine: Guard, state: GuardState, step: int) -> tuple[GuardState, int]:
    first = step
    while state.lowered and step < first + 100:
        state, _ = course(machine, event(step), state=state)
        step += 1
    return state, step - first


def test_each_relapse_holds_twice_as_long_and_finally_permanently():
    machine = guard()
    state, held = GuardState(), []
    for step in (0, 200, 400):
        state = relapse(machine, state, step)
        state, steps = steps_held(machine, state, step + 1)
        held.append(steps)
    assert held == [4, 8, 100] and state.lowered


def test_while_tf32_is_held_nothing_lower_is_tried():
    machine = guard()
    state = relapse(machine, GuardState(), 0)
    state, actions = course(machine, event(1, Bad.LOSS), event(1, Bad.LOSS), state=state)
    assert actions == [Action.RETRY, Action.QUARANTINE]
    assert state.lowered and state.held_until == 5  # the hold continues


@pytest.mark.parametrize("mode", ["tf32", "fp32"])
def test_full_precision_has_no_fallback(mode):
    state, actions = course(guard(mode), NOT_FINITE, NOT_FINITE)
    assert actions == [Action.RETRY, Action.QUARANTINE] and not state.lowered


def test_samples_not_finite_in_any_precision_are_quarantined_within_the_budget():
    machine = guard()
    climb = [NOT_FINITE] * 3
    state, actions = course(machine, *climb)
    assert actions == [Action.RETRY, Action.RETRY, Action.QUARANTINE]
    assert state == GuardState(quarantined=8, discarded=3)  # in the run's own precision again
    state, actions = course(machine, *climb, state=state)
    assert actions[-1] is Action.QUARANTINE and state.quarantined == 16
    state, decision = machine.decide(course(machine, *climb[:2], state=state)[0], climb[2])
    assert decision.action is Action.STOP and "samples to quarantine: 8, guard.max_quarantined 20 leaves 4" in decision.reason


def test_inputs_that_are_not_finite_are_quarantined_at_once():
    state, decision = guard().decide(GuardState(), event(bad=Bad.INPUT | Bad.LOSS | Bad.GRADIENT, suspects=1))
    assert decision.action is Action.QUARANTINE and state.quarantined == 1
    assert decision.reason == "the inputs are not finite; samples quarantined: 1"


def test_without_a_suspect_nothing_can_be_quarantined():
    assert course(guard(), event(bad=Bad.INPUT, suspects=0))[1] == [Action.STOP]


@pytest.mark.parametrize("bad", [Bad.WEIGHTS, Bad.MOMENTS, Bad.WEIGHTS | Bad.LOSS | Bad.INPUT])
@pytest.mark.parametrize("before", [(), (NOT_FINITE,), (NOT_FINITE, NOT_FINITE)])
def test_a_non_finite_state_is_rolled_back_on_any_rung(bad, before):
    machine = guard()
    state, actions = course(machine, *before, event(bad=bad))
    assert actions[-1] is Action.ROLL_BACK and state.rollbacks == 1
    assert state.rung is Rung.FIRST and not state.lowered
    assert course(machine, event(bad=bad), event(bad=bad), state=state)[1] == [Action.ROLL_BACK, Action.STOP]


def test_a_lowered_bound_still_holds():
    machine = guard(max_rollbacks=1, max_transients=1)
    assert course(machine, event(bad=Bad.WEIGHTS), state=GuardState(rollbacks=2))[1] == [Action.STOP]
    assert course(machine, NOT_FINITE, FINE, state=GuardState(transients=2))[1] == [Action.RETRY, Action.STOP]


def test_gradients_that_overflow_halve_the_scale_before_the_ladder_is_climbed():
    machine = guard("fp16")
    state, actions = course(machine, *[event(bad=Bad.GRADIENT)] * 3, FINE)
    assert actions == [Action.RETRY] * 3 + [Action.STEP]
    assert state == GuardState(scale=FIRST_SCALE / 8, steps_at_scale=1, discarded=3)


@pytest.mark.parametrize("bad", [Bad.LOSS, Bad.LOSS | Bad.GRADIENT])
def test_an_overflowing_loss_leaves_the_scale(bad):
    state, actions = course(guard("fp16"), event(bad=bad), event(bad=bad), FINE)
    assert actions == [Action.RETRY, Action.RETRY, Action.STEP]
    assert state.scale == FIRST_SCALE and state.lowered


def test_a_scale_that_did_not_help_is_restored():
    machine, overflow = guard("fp16"), event(bad=Bad.GRADIENT)
    halvings = round(math.log2(FIRST_SCALE))
    state, actions = course(machine, *[overflow] * (halvings + 2), FINE)
    assert actions == [Action.RETRY] * (halvings + 2) + [Action.STEP]
    assert state.lowered and state.scale == FIRST_SCALE


def test_the_scale_grows_after_many_steps_and_not_beyond_its_largest():
    machine, state = guard("fp16"), GuardState(scale=LARGEST_SCALE / 2)
    state, _ = course(machine, *[FINE] * (SCALE_GROWS_AFTER - 1), state=state)
    assert state.scale == LARGEST_SCALE / 2
    state, _ = course(machine, FINE, state=state)
    assert state.scale == LARGEST_SCALE and state.steps_at_scale == 0
    state, _ = course(machine, *[FINE] * SCALE_GROWS_AFTER, state=state)
    assert state.scale == LARGEST_SCALE


def test_halving_resets_the_count_of_good_steps():
    state, _ = course(guard("fp16"), *[FINE] * 7, event(bad=Bad.GRADIENT), FINE)
    assert state.steps_at_scale == 1


def test_in_tf32_the_scale_does_not_change():
    machine = guard("fp16", hold_steps=10**6)
    state = relapse(machine, GuardState(steps_at_scale=SCALE_GROWS_AFTER - 2), 0)
    assert course(machine, *[FINE] * 5, state=state)[0].scale == FIRST_SCALE
    state, actions = course(machine, event(bad=Bad.GRADIENT), state=state)
    assert actions == [Action.RETRY] and state.rung is Rung.AGAIN and state.scale == FIRST_SCALE


def test_only_fp16_has_a_scale():
    state, _ = course(guard("bf16"), event(bad=Bad.GRADIENT))
    assert state.rung is Rung.AGAIN and state.scale == FIRST_SCALE


SPIKY = dict(spike=6.0, spike_window=5)
CALM = [event(step, loss=1.0 + 0.01 * (step % 3), norm=2.0 + 0.02 * (step % 2)) for step in range(5)]


def calm(machine: Guard) -> GuardState:
    return course(machine, *CALM)[0]


@pytest.mark.parametrize("spike", [event(5, loss=1.5, norm=2.0), event(5, loss=1.0, norm=3.0)])
def test_a_spike_that_vanishes_in_tf32_was_precision(spike):
    machine = guard(**SPIKY)
    state, actions = course(machine, spike, event(5, norm=2.0), state=calm(machine))
    assert actions == [Action.RETRY, Action.STEP]
    assert state.lowered and state.held_until == 10


@pytest.mark.parametrize(("on_spike", "action"), [("take", Action.STEP), ("skip", Action.SKIP)])
@pytest.mark.parametrize("mode", ["bf16", "fp32"])
def test_a_spike_in_tf32_too_is_taken_or_skipped(on_spike, action, mode):
    machine = guard(mode, **SPIKY, on_spike=on_spike)
    spike = event(5, loss=1.5, norm=2.0)
    attempts = [spike, spike] if mode == "bf16" else [spike]
    state, actions = course(machine, *attempts, state=calm(machine))
    assert actions == [*[Action.RETRY] * (len(attempts) - 1), action]
    assert not state.lowered and state.rung is Rung.FIRST and state.holds == 0
    assert state.skipped == (action is Action.SKIP)
    assert (state.losses[-1] == 1.5) == (action is Action.STEP)  # a skipped step does not enter the window


def test_a_drop_is_no_spike_and_nothing_is_without_a_full_window():
    machine = guard(**SPIKY)
    assert course(machine, event(5, loss=0.01, norm=0.01), state=calm(machine))[1] == [Action.STEP]
    assert course(machine, event(5, loss=1.05, norm=2.0), state=calm(machine))[1] == [Action.STEP]  # two and a half deviations
    assert course(machine, *CALM[:4], event(4, loss=100.0))[1] == [Action.STEP] * 5


@pytest.mark.parametrize(("loss", "action"), [(1.1050, Action.STEP), (1.1051, Action.RETRY)])
def test_the_spike_threshold_is_the_documented_one(loss, action):
    """Six times 1.4826 * 0.01 + 0.001 * 1.01 above 1.01. The losses have median 1.01 and median absolute deviation 0.01."""
    machine = guard(**SPIKY)
    assert course(machine, event(5, loss=loss, norm=2.0), state=calm(machine))[1] == [action]


def test_constant_losses_do_not_make_every_step_a_spike():
    machine = guard(**SPIKY)
    state, _ = course(machine, *[event(norm=2.0)] * 5)
    assert course(machine, event(5, loss=1.0001, norm=2.0001), state=state)[1] == [Action.STEP]
    assert course(machine, event(5, loss=1.1, norm=2.0), state=state)[1] == [Action.RETRY]


def test_a_step_finite_only_in_tf32_is_taken_even_if_it_is_a_spike():
    machine = guard(**SPIKY)
    state, actions = course(machine, event(5, Bad.LOSS), event(5, Bad.LOSS), event(5, loss=9.0), state=calm(machine))
    assert actions == [Action.RETRY, Action.RETRY, Action.STEP] and state.lowered and state.holds == 1


def test_spikes_are_ignored_by_default():
    assert GuardConfig().spike == 0
    machine = guard(spike_window=5)
    assert course(machine, *CALM, event(5, loss=1e9, norm=1e9))[1] == [Action.STEP] * 6
    assert calm(machine).losses == ()


def test_a_disabled_guard_takes_every_step():
    assert course(guard(enabled=False), NOT_FINITE, event(bad=Bad.WEIGHTS))[1] == [Action.STEP] * 2


def test_a_state_survives_json_and_a_damaged_one_is_refused():
    machine = guard(**SPIKY)
    state = relapse(machine, calm(machine), 5)
    values = json.loads(json.dumps(state.to_dict()))
    assert GuardState.from_dict(values) == state
    for damage in ({"lowered": "yes"}, {"rung": "ninth"}, {"other": 1}):
        with pytest.raises(DataError):
            GuardState.from_dict(values | damage)


# Any course of events: outcomes of attempts, while the run continues
FLAGS = st.sampled_from([Bad.NOTHING] * 6 + [Bad(value) for value in range(1, 32)])
ATTEMPTS = st.lists(st.tuples(FLAGS, st.sampled_from([0.5, 1.0, 100.0]), st.integers(0, 12)), max_size=120)
CONFIGS = st.builds(
    GuardConfig,
    hold_steps=st.integers(1, 5),
    max_holds=st.integers(0, 3),
    max_transients=st.integers(0, 3),
    max_quarantined=st.integers(0, 30),
    max_rollbacks=st.integers(0, 3),
    spike=st.sampled_from([0.0, 3.0]),
    spike_window=st.integers(2, 4),
    on_spike=st.sampled_from(["take", "skip"]),
)
MODE_NAMES = st.sampled_from(sorted(MODES))


def longest_climb(config: GuardConfig) -> int:
    """An upper bound of attempts at a step: halvings, a retry, TF32, all of these for each quarantine, and roll backs."""
    climb = round(math.log2(LARGEST_SCALE)) + 4
    return climb * (1 + config.max_quarantined) + config.max_rollbacks + 1


@settings(max_examples=400, deadline=None)
@given(CONFIGS, MODE_NAMES, ATTEMPTS)
def test_no_non_finite_attempt_is_stepped_and_all_counts_are_bounded(config, mode, attempts):
    machine, state, step, permanent = Guard(config, MODES[mode]), GuardState(), 0, False
    for bad, size, suspects in attempts:
        at = event(step, bad, loss=size, norm=size, suspects=suspects)
        state, decision = machine.decide(state, at)
        assert not (decision.action in (Action.STEP, Action.SKIP) and bad)
        assert (decision.action is Action.ROLL_BACK) <= bool(bad & (Bad.WEIGHTS | Bad.MOMENTS))
        assert (decision.action is Action.QUARANTINE) <= bool(bad)
        assert state.quarantined <= config.max_quarantined
        assert state.rollbacks <= config.max_rollbacks
        assert state.transients <= config.max_transients
        assert state.holds <= config.max_holds + 1
        assert 1 <= state.scale * 2**state.halved <= LARGEST_SCALE and state.scale >= 1
        assert state.lowered <= (MODES[mode].fallback is not None)
        if decision.action is not Action.RETRY:
            assert state.rung is Rung.FIRST or decision.action is Action.STOP
            assert state.halved == 0 or decision.action is Action.STOP
            assert permanent <= (state.lowered or decision.action is Action.STOP)
            permanent = state.holds > config.max_holds and state.lowered
        if decision.action is not Action.STEP or bad:
            assert decision.reason
        if decision.action is Action.STOP:
            return
        step += decision.action in (Action.STEP, Action.SKIP)


@settings(max_examples=400, deadline=None)
@given(CONFIGS, MODE_NAMES, st.lists(st.tuples(FLAGS, st.integers(1, 12)), min_size=1, max_size=12))
def test_every_step_terminates(config, mode, course_of_events):
    """With the same events repeated, sooner or later each step is taken or skipped, or the run stops."""
    machine, state, attempts = Guard(config, MODES[mode]), GuardState(), 0
    while True:
        bad, suspects = course_of_events[attempts % len(course_of_events)]
        state, decision = machine.decide(state, event(3, bad, suspects=suspects))
        attempts += 1
        if decision.action in (Action.STEP, Action.SKIP, Action.STOP):
            return
        assert attempts < longest_climb(config)


@settings(max_examples=200, deadline=None)
@given(CONFIGS, MODE_NAMES, ATTEMPTS, st.integers(0, 119))
def test_ranks_and_a_resumed_run_decide_alike(config, mode, attempts, resumed):
    """Decisions depend on the events alone. A state that went through a checkpoint decides as if it had not."""
    one, other = Guard(config, MODES[mode]), Guard(config, MODES[mode])
    mine = theirs = GuardState()
    for number, (bad, size, suspects) in enumerate(attempts):
        if number == resumed:
            theirs = GuardState.from_dict(json.loads(json.dumps(theirs.to_dict())))
        at = event(number, bad, loss=size, norm=size, suspects=suspects)
        mine, decision = one.decide(mine, at)
        theirs, same = other.decide(theirs, at)
        assert (mine, decision) == (theirs, same)
