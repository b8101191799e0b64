"""What a store gives away whole: a snapshot for another one, and the log of its changes; of each kind."""

import pytest
from pydantic import ValidationError

from adapter_registry.errors import NotEmptyError
from adapter_registry.keys import NewKey
from adapter_registry.messages import HistoryLine
from adapter_registry.planning import Move, SetShadow, Split
from adapter_registry.snapshot import Snapshot
from adapter_registry.versions import Event
from tests.registry.test_stores import signed, verified


@pytest.fixture(params=["sqlite", "redis"])
def store(request, new_store):
    return new_store(request.param)


@pytest.mark.parametrize("source", ["sqlite", "redis"])
def test_all_goes_from_one_store_to_another(store, source, new_store, stored_adapter):
    other = new_store(source, "other")
    verified(other, "a", signed(stored_adapter(1), "a", "B"))
    verified(other, "a", stored_adapter(2))
    other.push("b", stored_adapter(1))
    other.change("b", Move(1, Event.PROBE_FAILED), reason="no")
    other.change("a", Move(2, Event.PROMOTE))
    other.change("a", Split({1: 1, 2: 2}))
    other.change("a", SetShadow({1: 0.5, 2: 12.25}))
    other.change("a", Move(2, Event.WARM))
    other.change("a", Split({2: 1}))
    other.change("a", Move(1, Event.RETIRE))
    text = other.dump().model_dump_json()
    store.load(Snapshot.model_validate_json(text))
    assert store.dump() == other.dump()
    assert (store.state(), store.idle(), store.digests()) == (other.state(), other.idle(), other.digests())
    assert [each.name for each in store.version("a", 1).signatures] == ["a", ""]
    with pytest.raises(NotEmptyError, match="this registry has 2 tasks already"):
        store.load(other.dump())
    assert store.push("c", stored_adapter(3)) == other.push("c", stored_adapter(3)) == (1, True)
    assert store.revision() == other.revision()
    assert store.version("c", 1).history[0].revision == store.revision()


@pytest.mark.parametrize(
    ("of_task", "value", "said"),
    [
        (True, {"task": "../a"}, "is no task name"),
        (True, {"routing": {"split": {"7": 100}}}, "a has no version 7 that answers"),
        (True, {"versions": []}, "a has no version 1"),
        (True, {"task": "b"}, "a@1 of b is another task's"),
        (False, {"revision": 9}, "or do not end at 9"),
        (False, {"format": 4}, "Input should be 3"),
    ],
)
def test_what_does_not_add_up_is_no_snapshot(new_store, stored_adapter, of_task, value, said):
    store = new_store("sqlite")
    verified(store, "a", stored_adapter(1))
    found = store.dump().model_dump(mode="json")
    (found["tasks"][0] if of_task else found).update(value)
    with pytest.raises(ValidationError, match=said):
        Snapshot.model_validate(found)


def test_only_the_latest_changes_are_read_if_only_these_are_wanted(store, stored_adapter, monkeypatch):
    for seed in (1, 2):
        verified(store, "a", stored_adapter(seed))
    for number in (2, 1, 2):
        store.change("a", Move(number, Event.PROMOTE))
    everything = store.history("a")
    read = []
    validate, validate_json = HistoryLine.model_validate, HistoryLine.model_validate_json
    monkeypatch.setattr(HistoryLine, "model_validate", lambda line: read.append(line) or validate(line))
    monkeypatch.setattr(
        HistoryLine, "model_validate_json", lambda line: read.append(line) or validate_json(line)
    )
    assert store.history("a", 1) == everything[-1:]
    assert len(read) <= 3, "of each version and of the task itself one, at most"
    for latest in range(1, 12):
        assert store.history("a", latest) == everything[-latest:]


def test_the_log_has_the_latest_changes_of_all_tasks(store, stored_adapter):
    assert store.log(10) == ()
    verified(store, "a", stored_adapter(1))
    verified(store, "b", stored_adapter(1))
    store.add_key(NewKey(name="alice"), "0" * 64, by="ada")
    store.push("a", stored_adapter(2))
    store.change("a", Move(2, Event.PROBE_OK), by="prefill-1")
    store.change("a", Split({1: 50, 2: 50}), by="ada")
    lines = store.log(100)
    assert [line.revision for line in lines] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    told = [(line.task, line.version, line.event, line.by) for line in lines[-3:]]
    assert told == [
        ("a", 2, Event.PROBE_OK, "prefill-1"),
        ("a", 2, Event.SPLIT, "ada"),
        ("a", None, Event.SPLIT, "ada"),
    ]
    assert [line.revision for line in store.log(2)] == [10, 11]
    ours = [dict(line) for line in lines if line.task == "a"]
    assert ours == [dict(line) | {"task": "a"} for line in store.history("a")]


def test_the_log_is_read_in_pages_from_a_revision_on(store, stored_adapter):
    verified(store, "a", stored_adapter(1))
    verified(store, "a", stored_adapter(2))
    for number in range(30):
        store.change("a", Move(1 + number % 2, Event.PROMOTE))
        if number % 10 == 0:
            store.add_key(NewKey(name=f"key-{number}"), f"{number:064x}")
    everything, revision = store.log(1000), store.revision()
    for most in (1, 7, 1000):
        after, found = 0, []
        while after != revision:
            lines, reached = store.log_since(after, revision, most)
            assert len(lines) <= most
            assert reached > after
            found += lines
            after = reached
        assert tuple(found) == everything
    assert store.log_since(5, 9, 1000)[0] == tuple(line for line in everything if 5 < line.revision <= 9)
    assert store.log_since(revision + 1, revision, 10) == ((), revision), "data were lost"
