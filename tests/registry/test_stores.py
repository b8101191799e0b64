"""What a store promises, asked of each: SQLite, and a real Redis."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from adapter_registry.errors import (
    IllegalTransitionError,
    InvalidRequestError,
    NoRoutingBeforeError,
    RoutingChangedError,
    TaskNotFoundError,
    VersionNotFoundError,
)
from adapter_registry.messages import SignedBy
from adapter_registry.planning import Move, Rollback, SetAlias, SetShadow, Split
from adapter_registry.snapshot import Snapshot
from adapter_registry.versions import Event, State


@pytest.fixture(params=["sqlite", "redis"])
def store(request, new_store):
    return new_store(request.param)


def verified(store, task, adapter):
    number, _ = store.push(task, adapter)
    store.change(task, Move(number, Event.PROBE_OK), by="prefill-1")
    return number


def shown(routing):
    return None if routing is None else routing.split


def test_it_begins_empty(store):
    assert (store.revision(), store.state().tasks, store.digests(), store.idle()) == (0, (), frozenset(), ())
    assert store.warnings() == ()
    with pytest.raises(TaskNotFoundError, match="there is no task 'a'"):
        store.task("a")
    with pytest.raises(TaskNotFoundError):
        store.version("a", 1)
    with pytest.raises(TaskNotFoundError):
        store.change("a", Move(1, Event.PROMOTE))
    assert store.revision() == 0


def test_the_same_files_are_the_same_version(store, stored_adapter):
    assert store.push("a", stored_adapter(1)) == (1, True)
    assert store.push("a", stored_adapter(1)) == (1, False)
    assert store.push("a", stored_adapter(2)) == (2, True)
    assert store.push("b", stored_adapter(1)) == (1, True)
    assert store.revision() == 3
    store.change("a", Move(1, Event.RETIRE))
    assert store.push("a", stored_adapter(1)) == (3, True)


def test_where_files_were_fetched_is_in_the_history_and_no_reason_of_a_failure(
    store, new_store, stored_adapter
):
    store.push("a", stored_adapter(1), by="ada", source="oci://ghcr.io/a@sha256:1")
    assert store.version("a", 1).source == "oci://ghcr.io/a@sha256:1"
    store.change("a", Move(1, Event.PROBE_FAILED), reason="too wide")
    assert store.push("a", stored_adapter(1), source="hf://org/a@2") == (1, False)
    found = store.version("a", 1)
    assert (found.state, found.reason, found.source) == ("pushed", "", "oci://ghcr.io/a@sha256:1")
    assert [line.reason for line in found.history] == [found.source, "too wide", "hf://org/a@2"]
    store.push("a", stored_adapter(2))
    assert store.version("a", 2).source == ""
    other = new_store("sqlite", "other")
    other.load(Snapshot.model_validate_json(store.dump().model_dump_json()))
    assert other.version("a", 1).source == found.source


def test_a_version_tells_everything(store, stored_adapter):
    adapter = stored_adapter(1)
    verified(store, "a", adapter)
    store.change("a", Move(1, Event.RETIRE), reason="worse")
    record = store.version("a", 1)
    assert (record.name, record.state, record.current, record.reason) == (
        "a@1",
        State.RETIRED,
        False,
        "worse",
    )
    assert (record.record, record.files) == (adapter.record, adapter.files)
    assert (record.tensors, record.tensor_bytes) == (adapter.tensors, adapter.tensor_bytes)
    told = [
        (line.revision, line.event, line.before, line.after, shown(line.routing)) for line in record.history
    ]
    assert told == [
        (1, "push", None, "pushed", None),
        (2, "probe_ok", "pushed", "verified", None),
        (3, "promote", "verified", "routable", {1: 100}),
        (4, "retire", "routable", "retired", {}),
    ]
    assert [line.by for line in record.history] == ["", "prefill-1", "prefill-1", ""]
    with pytest.raises(VersionNotFoundError, match="a has no version 2: it has 1"):
        store.version("a", 2)


def test_a_refused_event_changes_nothing(store, stored_adapter):
    store.push("a", stored_adapter(1))
    before = store.dump()
    with pytest.raises(IllegalTransitionError, match="no prefill service has verified it yet"):
        store.change("a", Move(1, Event.PROMOTE))
    assert store.dump() == before


def test_the_routing_has_a_revision_of_its_own(store, stored_adapter):
    assert verified(store, "a", stored_adapter(1)) == 1
    assert store.task("a").routing.revision == 3, "the first is promoted by its probe"
    verified(store, "a", stored_adapter(2))
    verified(store, "b", stored_adapter(1))
    assert store.task("a").routing.revision == 3, "neither a new version nor another task changes it"
    assert store.change("a", Move(2, Event.PROMOTE), expected=3) == store.task("a")
    assert store.task("a").routing.revision == 9
    with pytest.raises(RoutingChangedError, match="routing of 'a' is at revision 9, not 3"):
        store.change("a", Move(1, Event.PROMOTE), expected=3)
    with pytest.raises(RoutingChangedError):
        store.change("a", Move(2, Event.PROMOTE), expected=3)
    assert (store.revision(), store.task("a").routing.default) == (9, 2)
    same = store.change("a", Move(2, Event.PROMOTE), expected=9)
    assert same.routing.revision == 9, "nothing to change, no revision"
    assert store.change("a", Move(1, Event.RETIRE)).routing.revision == 10
    assert next(task for task in store.state().tasks if task.task == "a").routing.revision == 10


def test_a_routing_is_one_record_and_its_history_is_kept(store, stored_adapter):
    for seed in (1, 2, 3):
        verified(store, "a", stored_adapter(seed))
    store.change("a", SetAlias("canary", 2), by="ada")
    split = store.change("a", Split({1: 90, 3: 10}), by="ada").routing
    assert (split.split, split.aliases, split.default) == ({1: 90, 3: 10}, {"canary": 2}, 1)
    assert [v.state for v in store.task("a").versions] == [State.ROUTABLE] * 3, (
        "who is named may be routed to"
    )
    promoted = store.change("a", Move(3, Event.PROMOTE), by="bob").routing
    assert (promoted.split, promoted.previous, promoted.before) == ({3: 100}, 1, split.revision)
    events = [(line.event, line.version, line.by, shown(line.routing)) for line in store.history("a")]
    assert events[-4:] == [
        ("alias", 2, "ada", {1: 100}),
        ("split", 3, "ada", None),
        ("split", None, "ada", {1: 90, 3: 10}),
        ("promote", 3, "bob", {3: 100}),
    ]
    first = store.change("a", Rollback(), expected=promoted.revision).routing
    assert (first.split, first.aliases, first.before) == (split.split, split.aliases, split.before)
    assert store.change("a", Rollback()).routing.split == {1: 100}
    assert store.task("a").routing.aliases == {"canary": 2}
    assert store.change("a", Rollback()).routing.aliases == {}
    before = store.dump()
    with pytest.raises(NoRoutingBeforeError, match="no routing before"):
        store.change("a", Rollback())
    assert store.dump() == before
    with pytest.raises(TaskNotFoundError):
        store.history("b")


def test_a_shadow_is_part_of_the_routing_and_ends_with_its_version(store, stored_adapter):
    for seed in (1, 2, 3):
        verified(store, "a", stored_adapter(seed))
    first = store.change("a", SetShadow({2: 5.0, 3: 0.5}), by="ada").routing
    assert (first.split, first.shadow, first.before) == ({1: 100}, {2: 5.0, 3: 0.5}, 3)
    states = [v.state for v in store.task("a").versions]
    assert states == [State.ROUTABLE, State.VERIFIED, State.VERIFIED], "they answer nobody"
    (line,) = store.history("a", 1)
    assert (line.event, line.by, line.version, line.routing) == ("shadow", "ada", None, first)
    assert store.change("a", SetShadow({2: 5.0, 3: 0.5})).routing == first, "it is so already"
    assert store.change("a", Split({1: 9, 3: 1})).routing.shadow == first.shadow
    assert store.change("a", Move(2, Event.RETIRE)).routing.shadow == {3: 0.5}, "unasked, and no step back"
    back = store.change("a", Rollback()).routing
    assert (back.split, back.shadow) == ({1: 100}, {3: 0.5}), "without who cannot answer any more"
    assert store.change("a", SetShadow({})).routing.shadow == {}
    before = store.dump()
    with pytest.raises(
        IllegalTransitionError, match=r"a@2 is retired, which does not allow shadow .unretire"
    ):
        store.change("a", SetShadow({2: 1.0}))
    assert store.dump() == before


def test_nobody_is_the_shadow_of_itself(store, stored_adapter):
    for seed in (1, 2):
        verified(store, "a", stored_adapter(seed))
    store.change("a", SetShadow({2: 5.0}))
    assert store.change("a", Split({1: 9, 2: 1})).routing.shadow == {2: 5.0}
    assert store.change("a", Move(1, Event.RETIRE, force=True)).routing.shadow == {}
    with pytest.raises(InvalidRequestError, match="a@2 answers every request for 'a' itself"):
        store.change("a", SetShadow({2: 5.0}))
    store.change("a", Move(1, Event.UNRETIRE))
    store.change("a", Move(1, Event.PROBE_OK))
    store.change("a", SetShadow({1: 5.0}))
    assert store.change("a", Move(1, Event.PROMOTE)).routing.shadow == {}
    back = store.change("a", Rollback()).routing
    assert (back.split, back.shadow) == ({2: 100}, {1: 5.0})


def test_to_be_loaded_is_wanted_anew_each_time(store, stored_adapter):
    verified(store, "a", stored_adapter(1))
    store.push("a", stored_adapter(2))
    for revision in (5, 6):
        assert store.change("a", Move(1, Event.WARM), by="ada").versions[0].warmed == revision
        (line,) = store.history("a", 1)
        assert (line.event, line.version, line.before, line.after) == ("warm", 1, "routable", "routable")
    assert store.task("a").routing.revision == 3, "which is no change of the routing"
    assert [v.warmed for v in store.state().tasks[0].versions] == [6, 0]
    with pytest.raises(IllegalTransitionError, match=r"a@2 is pushed, .*no prefill service has verified it"):
        store.change("a", Move(2, Event.WARM))
    assert store.revision() == 6


def test_a_rollback_passes_what_a_forced_retire_led_back_to(store, stored_adapter):
    for task in "ab":
        for seed in (1, 2, 3):
            verified(store, task, stored_adapter(seed))
        store.change(task, Move(2, Event.PROMOTE))
    store.change("a", Split({2: 90, 3: 10}))
    store.change("b", Move(3, Event.PROMOTE))
    for task in "ab":
        assert store.change(task, Move(3, Event.RETIRE, force=True)).routing.split == {2: 100}
        assert store.change(task, Rollback()).routing.split == {1: 100}
        with pytest.raises(NoRoutingBeforeError, match="nothing to go back to"):
            store.change(task, Rollback())


def test_who_takes_over_beside_an_alias_is_no_step_to_take_back(store, stored_adapter):
    for seed in (1, 2, 3):
        verified(store, "a", stored_adapter(seed))
    store.change("a", Move(2, Event.PROMOTE))
    store.change("a", SetAlias("canary", 2))
    store.change("a", Split({3: 1}))
    assert store.change("a", Move(3, Event.RETIRE, force=True)).routing.split == {2: 100}
    undone = store.change("a", Rollback()).routing
    assert (undone.split, undone.aliases) == ({2: 100}, {})


def test_a_race_on_one_routing_has_one_winner(store, stored_adapter):
    for seed in range(6):
        verified(store, "a", stored_adapter(seed))
    seen = store.task("a").routing.revision

    def promote(version):
        try:
            return version, store.change("a", Move(version, Event.PROMOTE), expected=seen).routing.revision
        except RoutingChangedError:
            return None

    with ThreadPoolExecutor(5) as pool:
        (won,) = filter(None, pool.map(promote, range(2, 7)))
    task = store.task("a")
    assert (task.routing.default, task.routing.revision) == won


def test_changes_at_once_all_count(store, stored_adapter):
    with ThreadPoolExecutor(6) as pool:
        numbers = list(pool.map(lambda seed: store.push("a", stored_adapter(seed))[0], range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert store.revision() == 24
    revisions = [line.revision for number in numbers for line in store.version("a", number).history]
    assert sorted(revisions) == list(range(1, 25))


def test_idle_are_those_whose_files_nobody_needs(store, stored_adapter):
    shared, own, failed = (stored_adapter(seed) for seed in (1, 2, 3))
    verified(store, "a", shared)
    store.push("b", shared)
    verified(store, "a", own)
    store.push("a", failed)
    store.change("a", Move(3, Event.PROBE_FAILED), reason="too wide")
    store.change("a", Move(2, Event.RETIRE))
    store.change("b", Move(1, Event.RETIRE))
    size = sum(file.size for file in own.files)
    assert [(i.task, i.version, i.nbytes) for i in store.idle()] == [("a", 3, size), ("a", 2, size)]
    store.change("a", Move(3, Event.DELETE))
    assert [(i.task, i.version) for i in store.idle()] == [("a", 2)]
    assert store.version("a", 3).reason == "too wide", "it still says why"
    assert store.digests() == {shared.digest, own.digest}


def signed(adapter, *names):
    """As if by somebody with a key of that letter; an upper-case one has no name here."""
    by = (
        SignedBy(
            key=f"{name.upper() * 43}=",
            signature=f"{name.upper() * 86}==",
            name=name if name.islower() else "",
        )
        for name in names
    )
    return replace(adapter, signatures=tuple(by))


def test_signatures_are_kept_with_the_files(store, stored_adapter):
    adapter = stored_adapter(1)
    store.push("a", adapter)
    assert store.version("a", 1).signatures == ()
    assert store.push("a", signed(adapter, "A")) == (1, False)
    assert [each.name for each in store.version("a", 1).signatures] == [""]
    assert store.push("a", signed(adapter, "b", "a")) == (1, False)
    names = [each.name for each in store.version("a", 1).signatures]
    assert names == ["a", "b"], "the same key has a name now"
    store.push("a", adapter)
    store.push("b", signed(adapter, "A"))
    assert [each.name for each in store.version("b", 1).signatures] == names, "nothing is forgotten"
    assert store.revision() == 2, "what was signed is no other version"
    store.push("b", signed(adapter, *"CDEFGHIJKLMNOPQRSTUVW"))
    assert len(found := store.version("b", 1).signatures) == 16
    assert [each.name for each in found[:3]] == ["a", "b", ""], "those without a name go first"
