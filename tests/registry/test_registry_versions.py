"""The state machine and the routing policy, as plain data."""

from collections.abc import Mapping
from typing import Any

import pytest

from adapter_registry.errors import (
    IllegalTransitionError,
    InvalidRequestError,
    NoRoutingBeforeError,
    VersionNotFoundError,
    VersionRoutedError,
)
from adapter_registry.planning import Change, Move, Rollback, SetAlias, Split, TaskView, Wanted, plan
from adapter_registry.routing import Routing
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


def view(states: dict[int, State], split: Mapping[int, int] | None = None, **more: Any) -> TaskView:
    return TaskView("t", Routing(revision=7, split=split or {}, **more), states)


def planned(of: TaskView, wanted: Wanted, past: Routing | None = None) -> tuple[Change, ...]:
    return plan(of, wanted, lambda revision: past)


def shown(changes: tuple[Change, ...]) -> list[tuple[int | None, str, Mapping[int, int] | None]]:
    return [(c.version, c.event.value, None if c.routing is None else c.routing.split) for c in changes]


BOTH = {1: State.ROUTABLE, 2: State.ROUTABLE}


def test_the_first_verified_version_is_promoted() -> None:
    changes = planned(view({1: State.PUSHED}), Move(1, Event.PROBE_OK))
    assert [c.after for c in changes] == [State.VERIFIED, State.ROUTABLE]
    assert shown(changes) == [(1, "probe_ok", None), (1, "promote", {1: 100})]


def test_a_later_one_waits_for_promotion() -> None:
    changes = planned(view({1: State.ROUTABLE, 2: State.PUSHED}, {1: 100}), Move(2, Event.PROBE_OK))
    assert shown(changes) == [(2, "probe_ok", None)]


def test_promoting_leaves_the_earlier_one_routable() -> None:
    before = view({1: State.ROUTABLE, 2: State.VERIFIED}, {1: 100})
    (change,) = planned(before, Move(2, Event.PROMOTE))
    assert (change.version, change.before, change.after) == (2, State.VERIFIED, State.ROUTABLE)
    assert change.routing == Routing(split={2: 100}, previous=1, before=7, revision=7)


def test_what_is_so_already_changes_nothing() -> None:
    of = view(BOTH, {1: 90, 2: 10}, aliases={"canary": 2})
    for wanted in (Split({2: 10, 1: 90}), SetAlias("canary", 2), SetAlias("other", None)):
        assert planned(of, wanted) == ()
    assert planned(view(BOTH, {1: 100}), Move(1, Event.PROMOTE)) == ()
    assert planned(view(BOTH, {1: 100}), Split({1: 7})) == (), "alone it has everything"


def test_what_a_name_means_is_retired_by_force_only() -> None:
    three = {1: State.ROUTABLE, 2: State.ROUTABLE, 3: State.ROUTABLE}
    with pytest.raises(
        VersionRoutedError, match=r"t@3 is what t means; promote another first .*t@2 takes over"
    ):
        planned(view(three, {3: 100}), Move(3, Event.RETIRE))
    changes = planned(view(three, {3: 100}), Move(3, Event.RETIRE, force=True))
    assert shown(changes) == [(3, "retire", {}), (2, "promote", {2: 100})]

    of = view(three, {1: 90, 2: 5, 3: 5}, aliases={"canary": 3})
    said = (
        r"t@3 is what t \(5 of 100\) and t@canary means; .*alias.*t@1, t@2 take over, and its alias is gone"
    )
    with pytest.raises(VersionRoutedError, match=said):
        planned(of, Move(3, Event.RETIRE))
    (change,) = planned(of, Move(3, Event.RETIRE, force=True))
    assert change.routing is not None
    assert (change.routing.split, change.routing.aliases) == ({1: 90, 2: 5}, {})

    with pytest.raises(VersionRoutedError, match="t@1 is what t and t@safe means"):
        planned(view({1: State.ROUTABLE}, {1: 100}, aliases={"safe": 1}), Move(1, Event.RETIRE))


def test_a_verified_version_never_takes_over_by_force() -> None:
    of = view({1: State.ROUTABLE, 2: State.VERIFIED}, {1: 100})
    with pytest.raises(VersionRoutedError, match="stops answering"):
        planned(of, Move(1, Event.RETIRE))
    assert shown(planned(of, Move(1, Event.RETIRE, force=True))) == [(1, "retire", {})]


def test_retiring_the_only_one_leaves_none() -> None:
    changes = planned(view({1: State.ROUTABLE}, {1: 100}), Move(1, Event.RETIRE))
    assert (shown(changes), changes[0].after) == ([(1, "retire", {})], State.RETIRED)


def test_previous_follows_and_keeps_nobody_from_retiring() -> None:
    of = view(BOTH, {2: 100}, previous=1)
    assert of.routing.meant("previous") == 1
    (change,) = planned(of, Move(1, Event.RETIRE))
    assert change.routing is not None
    assert (change.routing.split, change.routing.previous) == ({2: 100}, None)
    grown = of.routing.divided({1: 50, 2: 50})
    assert (grown.default, grown.previous) == (1, 2)


def test_a_rollback_to_what_answers_no_more_is_refused() -> None:
    of = view({1: State.RETIRED, 2: State.ROUTABLE}, {2: 100}, before=3)
    with pytest.raises(NoRoutingBeforeError, match=r"of revision 3, names t@1, which is retired: unretire"):
        planned(of, Rollback(), Routing(revision=3, split={1: 100}))


def test_only_what_answers_is_routed_to() -> None:
    of = view({1: State.ROUTABLE, 2: State.PUSHED, 3: State.FAILED, 4: State.RETIRED}, {1: 100})
    for wanted in (Split({1: 1, 2: 1}), SetAlias("x", 3), Move(4, Event.PROMOTE)):
        with pytest.raises(
            IllegalTransitionError, match=r"until one has probed|its probe failed|unretire it"
        ):
            planned(of, wanted)
    for wanted in (Split({1: 1, 9: 1}), SetAlias("x", 9), Move(9, Event.PROMOTE)):
        with pytest.raises(VersionNotFoundError, match="t has no version 9"):
            planned(of, wanted)


@pytest.mark.parametrize("alias", ["", "2", "Canary", "a" * 33, "a b", "previous", "latest"])
def test_an_alias_that_cannot_be_set(alias: str) -> None:
    with pytest.raises(InvalidRequestError, match="alias"):
        planned(view(BOTH, {1: 100}), SetAlias(alias, 1))


def test_aliases_are_bounded() -> None:
    of = view(BOTH, {1: 100}, aliases={f"a{n}": 1 for n in range(64)})
    with pytest.raises(InvalidRequestError, match="as many as a task may have"):
        planned(of, SetAlias("one-more", 1))
