"""What changed since is told to who knows the rest, and everything to whoever might not."""

from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis

from adapter_registry import redis_stream, sqlite_store
from adapter_registry.client import RegistryClient
from adapter_registry.keys import NewKey
from adapter_registry.messages import RoutingState
from adapter_registry.planning import Move, SetAlias
from adapter_registry.redis_store import RedisStore
from adapter_registry.sqlite_store import SqliteStore
from adapter_registry.store import Store, StoredAdapter
from adapter_registry.versions import Event
from tests.redis_process import RedisProcess
from tests.registry.conftest import Running

Adapter = Callable[[int], StoredAdapter]
KINDS = ["sqlite", "redis"]


def filled(store: Store, adapter: Adapter, tasks: int = 3) -> RoutingState:
    for number in range(tasks):
        store.push(f"t{number}", adapter(number))
        store.change(f"t{number}", Move(1, Event.PROBE_OK))
    return store.state()


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_changed_is_told(
    new_store: Callable[..., Store], stored_adapter: Adapter, kind: str
) -> None:
    store = new_store(kind)
    assert store.changed(0, "") is None, "there was no change yet that anybody could know"
    known = filled(store, stored_adapter)
    nothing = store.changed(known.revision, known.mark)
    assert nothing is not None
    assert (nothing.tasks, nothing.same_keys, nothing.on(known)) == ((), True, known)
    store.change("t1", SetAlias("canary", 1))
    store.change("t1", SetAlias("blue", 1))
    told = store.changed(known.revision, known.mark)
    assert told is not None
    assert ([task.task for task in told.tasks], told.since) == (["t1"], known.revision)
    assert told.on(known) == store.state()
    store.add_key(NewKey(name="alice"), "0" * 64)
    store.change("t0", Move(1, Event.RETIRE, force=True))
    store.change("t0", Move(1, Event.DELETE))
    more = store.changed(told.revision, told.mark)
    assert more is not None
    assert (more.same_keys, [key.name for key in more.keys or ()]) == (False, ["alice"])
    assert more.on(told.on(known)) == store.state()


@pytest.mark.parametrize("kind", KINDS)
def test_who_may_not_know_the_rest_is_told_everything(
    new_store: Callable[..., Store], stored_adapter: Adapter, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(kind)
    known = filled(store, stored_adapter)
    assert store.changed(known.revision, "") is None, "a replica of an older program"
    assert store.changed(known.revision, "another") is None
    assert store.changed(known.revision + 1, known.mark) is None, "the data went back"
    assert store.changed(-1, known.mark) is None
    for module in (sqlite_store, redis_stream):
        monkeypatch.setattr(module, "MOST_CHANGES", 2)
    for name in ("a", "b"):
        store.change("t0", SetAlias(name, 1))
    assert store.changed(known.revision, known.mark) is not None
    store.change("t0", SetAlias("c", 1))
    assert store.changed(known.revision, known.mark) is None, "too far behind"


def others_in_their_place(store: Store, revision: int) -> None:
    """As many changes, and one more, of another task."""
    while store.revision() <= revision:
        store.change("t2", SetAlias(f"other{store.revision()}", 1))


def test_changes_in_the_place_of_lost_ones_are_no_continuation(
    tmp_path: Path, stored_adapter: Adapter
) -> None:
    path = tmp_path / "registry.sqlite3"
    store = SqliteStore(path)
    filled(store, stored_adapter)
    store.close()
    backup = path.read_bytes()
    store = SqliteStore(path)
    store.change("t0", SetAlias("lost", 1))
    known = store.state()
    store.close()
    for beside in tmp_path.glob("registry.sqlite3-*"):
        beside.unlink()
    path.write_bytes(backup)
    store = SqliteStore(path)
    others_in_their_place(store, known.revision)
    assert store.changed(known.revision, known.mark) is None
    store.close()


def test_nor_are_they_in_redis(redis: RedisProcess, stored_adapter: Adapter) -> None:
    store = RedisStore(redis.url)
    filled(store, stored_adapter)
    raw = Redis.from_url(redis.url)
    backup = {key: raw.dump(key) for key in raw.scan_iter("*")}
    store.change("t0", SetAlias("lost", 1))
    known = store.state()
    raw.flushall()
    for key, value in backup.items():
        raw.restore(key, 0, value or b"")
    others_in_their_place(store, known.revision)
    assert store.changed(known.revision, known.mark) is None
    latest = store.state()
    raw.xtrim(redis_stream.CHANGES, maxlen=1)
    assert store.changed(latest.revision - 1, known.mark) is None, "the stream does not reach back so far"
    assert store.changed(latest.revision, latest.mark) is not None
    raw.xadd(
        redis_stream.CHANGES, {"task": "t0", "version": "", "event": "alias"}, id=f"{latest.revision + 1}-0"
    )
    raw.hincrby("{prad}:registry", "revision", 1)
    unmarked = store.state()
    assert unmarked.mark == "", "an older registry beside this one wrote it"
    told = store.changed(latest.revision, latest.mark)
    assert told is not None
    assert told.mark == ""
    raw.close()
    store.close()


def test_over_http_by_the_mark_alone(registry: Running, adapter: Callable[..., Path]) -> None:
    client: RegistryClient = registry.client
    for task in ("a", "b"):
        registry.push(adapter(ord(task)), task)
    known = client.state()

    def ask(**asked: int | str) -> RoutingState:
        reply = registry.http.get("/v1/changes", params={"wait": 0, **asked})
        return RoutingState.model_validate_json(reply.content)

    assert known.mark
    registry.push(adapter(7), "b")
    whole = ask(after=known.revision)
    assert (whole.since, [task.task for task in whole.tasks]) == (None, ["a", "b"]), (
        "as replicas asked before"
    )
    told = ask(after=known.revision, mark=known.mark)
    assert (told.since, [task.task for task in told.tasks]) == (known.revision, ["b"])
    assert told.on(known) == client.state() == whole
    same = {"after": whole.revision, "wait": 0}
    assert registry.http.get("/v1/changes", params=same | {"mark": whole.mark}).status_code == 204
    assert ask(**same, mark="of another history").since is None, "at once, though the revision is the same"
