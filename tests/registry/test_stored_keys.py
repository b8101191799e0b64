"""Keys in a store, of either kind: kept, revoked, moved, and in data from before there were any."""

import sqlite3

import pytest
from redis import Redis

from adapter_registry.errors import KeyExistsError, KeyNotFoundError, NotEmptyError
from adapter_registry.keys import KeyLimits, NewKey, Role, hashed
from adapter_registry.redis_store import RedisStore
from adapter_registry.snapshot import Snapshot
from adapter_registry.sqlite_store import SqliteStore


@pytest.fixture(params=["sqlite", "redis"])
def store(request, new_store):
    return new_store(request.param)


def test_a_store_keeps_keys(store, stored_adapter):
    store.push("a", stored_adapter(1))
    limits = KeyLimits(requests_per_minute=60, concurrent=2)
    alice = store.add_key(NewKey(name="alice", tasks=("a", "Org/Model"), limits=limits), "1" * 64, by="ada")
    boss = store.add_key(NewKey(name="boss", role=Role.ADMIN), "2" * 64)
    assert (alice.revision, boss.revision, store.revision()) == (2, 3, 3)
    assert store.keys() == (alice, boss)
    assert store.state().keys == (alice,), "prefill services have no use for an operator's"
    with pytest.raises(KeyExistsError, match="'alice' already: choose another name"):
        store.add_key(NewKey(name="alice"), "3" * 64)
    with pytest.raises(KeyNotFoundError, match="no key 'bob'"):
        store.revoke_key("bob")
    assert store.revision() == 3
    gone = store.revoke_key("alice", by="bob")
    assert (gone.revision, gone.revoked_by, gone.created_by) == (4, "bob", "ada")
    assert store.revoke_key("alice") == gone
    with pytest.raises(KeyExistsError, match="which is revoked"):
        store.add_key(NewKey(name="alice"), "3" * 64)
    assert (store.revision(), store.keys()) == (4, (gone, boss))
    assert store.push("a", stored_adapter(2)) == (2, True)
    assert store.revision() == 5


@pytest.mark.parametrize("source", ["sqlite", "redis"])
def test_keys_go_along_to_another_store(store, source, new_store, stored_adapter):
    other = new_store(source, "other")
    other.add_key(NewKey(name="alice"), "1" * 64)
    other.push("a", stored_adapter(1))
    other.revoke_key("alice")
    store.load(Snapshot.model_validate_json(other.dump().model_dump_json()))
    assert (store.dump(), store.revision(), store.keys()) == (other.dump(), 3, other.keys())
    twice = other.dump().model_dump(mode="json")
    twice["keys"] += twice["keys"]
    with pytest.raises(ValueError, match="have a revision twice"):
        Snapshot.model_validate(twice)


def test_registries_that_run_on_a_redis_hear_of_keys_that_are_read_into_it(new_store, redis):
    other = new_store("sqlite", "other")
    other.add_key(NewKey(name="alice"), "1" * 64)
    store = RedisStore(redis.url)
    store.load(other.dump())
    store.close()
    with Redis.from_url(redis.url) as client:
        ((last, _),) = client.xrevrange("{prad}:changes", count=1)
    assert last == b"1-0"


def test_prefill_services_are_told_what_is_in_force_or_that_something_was(store):
    for name in ("alice", "bob", "carol"):
        store.add_key(NewKey(name=name), hashed(name))
    store.revoke_key("alice")
    assert [key.name for key in store.state().keys] == ["bob", "carol"]
    for name in ("bob", "carol"):
        store.revoke_key(name)
    (left,) = store.state().keys
    assert left.revoked_at is not None


def test_an_export_is_read_into_a_registry_without_keys(store):
    store.add_key(NewKey(name="alice"), "1" * 64)
    with pytest.raises(NotEmptyError, match="this registry has 1 keys already"):
        store.load(Snapshot(revision=0, tasks=()))


def test_data_from_before_there_were_keys_become_todays(tmp_path, stored_adapter, redis):
    def check(store):
        assert (store.revision(), store.keys()) == (1, ())
        assert store.add_key(NewKey(name="alice"), "1" * 64).revision == 2
        assert [key.name for key in store.state().keys] == ["alice"]
        assert store.version("a", 1).digest == stored_adapter(1).digest
        store.close()

    path = tmp_path / "before.sqlite3"
    for made in (SqliteStore(path), RedisStore(redis.url)):
        made.push("a", stored_adapter(1))
        made.close()
    with sqlite3.connect(path) as before:
        before.executescript(
            "DROP TABLE keys; ALTER TABLE adapters DROP COLUMN signatures; "
            "ALTER TABLE versions DROP COLUMN warmed; PRAGMA user_version = 3"
        )
    before.close()
    check(SqliteStore(path))
    with Redis.from_url(redis.url) as client:
        client.hset("{prad}:registry", "schema", 2)
    check(RedisStore(redis.url))
