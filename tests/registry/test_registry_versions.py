"""The state machine and the routing policy, as plain data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_registry.errors import CurrentVersionInUseError, IllegalTransitionError, VersionNotFoundError
from adapter_registry.routing import TaskView, plan
from adapter_registry.versions import TRANSITIONS, Event, State, after


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_a_move_is_legal_or_names_what_is(state: State, event: Event) -> None:
    if event in TRANSITIONS[state]:
        assert after("support@1", state, event) in State
    else:
        with pytest.raises(
            IllegalTransitionError, match=f"support@1 is {state}, which does not allow {event}"
        ):
            after("support@1", state, event)


def test_retired_comes_back_through_a_probe_and_deleted_never() -> None:
    assert TRANSITIONS[State.RETIRED][Event.UNRETIRE] is State.PUSHED
    assert set(TRANSITIONS[State.DELETED].values()) == {State.DELETED}


@pytest.mark.parametrize("state", State)
def test_what_answers_is_never_deleted(state: State) -> None:
    assert (Event.DELETE in TRANSITIONS[state]) is not state.answers


def test_the_first_verified_version_becomes_current() -> None:
    changes = plan(TaskView("t", None, {1: State.PUSHED}), 1, Event.PROBE_OK)
    assert [(c.after, c.current) for c in changes] == [(State.VERIFIED, None), (State.ROUTABLE, 1)]


def test_a_later_one_waits_for_promotion() -> None:
    view = TaskView("t", 1, {1: State.ROUTABLE, 2: State.PUSHED})
    assert [(c.after, c.current) for c in plan(view, 2, Event.PROBE_OK)] == [(State.VERIFIED, 1)]


def test_promoting_leaves_the_earlier_one_routable() -> None:
    view = TaskView("t", 1, {1: State.ROUTABLE, 2: State.VERIFIED})
    assert [(c.version, c.after, c.current) for c in plan(view, 2, Event.PROMOTE)] == [(2, State.ROUTABLE, 2)]


def test_promoting_the_current_one_again_changes_nothing() -> None:
    assert plan(TaskView("t", 1, {1: State.ROUTABLE}), 1, Event.PROMOTE) == ()


def test_retiring_the_current_one_needs_force_while_another_answers() -> None:
    view = TaskView("t", 3, {1: State.ROUTABLE, 2: State.ROUTABLE, 3: State.ROUTABLE})
    with pytest.raises(CurrentVersionInUseError, match="t@2 takes over"):
        plan(view, 3, Event.RETIRE)
    changes = plan(view, 3, Event.RETIRE, force=True)
    assert [(c.version, c.event, c.current) for c in changes] == [(3, "retire", None), (2, "promote", 2)]


def test_a_verified_version_never_takes_over_by_force() -> None:
    view = TaskView("t", 1, {1: State.ROUTABLE, 2: State.VERIFIED})
    with pytest.raises(CurrentVersionInUseError, match="stops answering"):
        plan(view, 1, Event.RETIRE)
    assert [(c.version, c.current) for c in plan(view, 1, Event.RETIRE, force=True)] == [(1, None)]


def test_retiring_the_only_one_leaves_none() -> None:
    assert [(c.after, c.current) for c in plan(TaskView("t", 1, {1: State.ROUTABLE}), 1, Event.RETIRE)] == [
        (State.RETIRED, None)
    ]


def test_unknown_version() -> None:
    with pytest.raises(VersionNotFoundError, match="t has no version 2"):
        plan(TaskView("t", 1, {1: State.ROUTABLE}), 2, Event.PROMOTE)


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(Event), st.booleans()), max_size=30))
def test_the_current_version_is_always_routable(moves: list[tuple[int, Event, bool]]) -> None:
    view = TaskView("t", None, {1: State.PUSHED, 2: State.PUSHED, 3: State.PUSHED})
    for version, event, force in moves:
        try:
            changes = plan(view, version, event, force=force)
        except (IllegalTransitionError, CurrentVersionInUseError):
            continue
        for change in changes:
            assert change.before is view.states[change.version]
            view = TaskView("t", change.current, {**view.states, change.version: change.after})
        assert view.current is None or view.states[view.current] is State.ROUTABLE
