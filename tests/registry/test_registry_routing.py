"""If-Match on a routing over HTTP; a database of an older or newer program."""

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError
from redis import Redis
from typer.testing import CliRunner

from adapter_registry.errors import (
    CannotStartError,
    NoRoutingBeforeError,
    RoutingChangedError,
    StoreUnavailableError,
)
from adapter_registry.planning import Move, Rollback
from adapter_registry.redis_store import RedisStore
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from adapter_registry.snapshot import Snapshot
from adapter_registry.sqlite_schema import SCHEMA
from adapter_registry.sqlite_store import SqliteStore
from adapter_registry.versions import Event
from prad_cli.app import app


def prad(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


OLDEST = """
CREATE TABLE tasks (task TEXT PRIMARY KEY, current INTEGER) STRICT;
CREATE TABLE adapters (
    digest TEXT PRIMARY KEY, method TEXT NOT NULL, base TEXT NOT NULL, record TEXT NOT NULL,
    files TEXT NOT NULL, tensors INTEGER NOT NULL, tensor_bytes INTEGER NOT NULL
) STRICT;
CREATE TABLE versions (
    task TEXT NOT NULL REFERENCES tasks, version INTEGER NOT NULL, digest TEXT NOT NULL REFERENCES adapters,
    state TEXT NOT NULL, reason TEXT NOT NULL, pushed_at TEXT NOT NULL, PRIMARY KEY (task, version)
) STRICT;
CREATE TABLE history (
    revision INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, version INTEGER NOT NULL,
    event TEXT NOT NULL, before TEXT, after TEXT NOT NULL, current INTEGER, at TEXT NOT NULL,
    replica TEXT NOT NULL, reason TEXT NOT NULL, FOREIGN KEY (task, version) REFERENCES versions
) STRICT;
CREATE INDEX history_of_version ON history (task, version);
"""


def test_a_change_is_made_only_to_the_routing_that_was_seen(registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    seen = registry.http.get("/v1/tasks/support")
    assert seen.headers["etag"] == f'"{seen.json()["routing"]["revision"]}"' == '"3"'
    path = "/v1/tasks/support/versions/{}/{}"
    won = registry.http.post(path.format(2, "promote"), headers={"If-Match": seen.headers["etag"]})
    assert (won.status_code, won.headers["etag"]) == (200, f'"{won.json()["routing"]["revision"]}"')
    assert registry.http.get("/v1/tasks/support").headers["etag"] == won.headers["etag"]
    for verb in ("promote", "retire"):
        lost = registry.http.post(path.format(1, verb), headers={"If-Match": seen.headers["etag"]})
        assert (lost.status_code, lost.json()["error"]["code"]) == (412, "routing_changed")
        assert lost.json()["error"]["param"] == "if-match"
    with pytest.raises(RoutingChangedError, match="is at revision 6, not 3"):
        registry.client.retire("support", 1, seen=3)
    assert registry.client.retire("support", 1, seen=6).routing.revision == 7
    assert registry.http.post(path.format(2, "promote"), headers={"If-Match": "*"}).status_code == 200


def test_a_routing_is_changed_over_http(registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    tag = registry.http.get("/v1/tasks/support").headers["etag"]
    for method, path, body in (
        ("PUT", "split", {"weights": {"1": 90, "2": 10}}),
        ("PUT", "aliases/canary", {"version": 2}),
        ("PUT", "shadow", {"shares": {"2": 5}}),
        ("POST", "versions/2/promote", None),
        ("POST", "rollback", None),
        ("DELETE", "aliases/canary", None),
    ):
        ask = {"headers": {"If-Match": tag, "x-prad-operator": "ada"}, "json": body}
        won = registry.http.request(method, f"/v1/tasks/support/{path}", **ask)
        assert won.status_code == 200, won.text
        lost = registry.http.request(method, f"/v1/tasks/support/{path}", **ask)
        assert (lost.status_code, lost.json()["error"]["code"]) == (412, "routing_changed")
        tag = won.headers["etag"]
        assert won.json()["routing"] == registry.http.get("/v1/tasks/support").json()["routing"]
    assert won.json()["routing"]["split"] == {"1": 90, "2": 10}
    events = registry.http.get("/v1/tasks/support/events", params={"latest": 6}).json()["events"]
    assert [each["event"] for each in events] == ["split", "alias", "shadow", "promote", "rollback", "alias"]
    assert {each["by"] for each in events} == {"ada"}
    registry.http.post("/v1/tasks/support/rollback")
    assert registry.client.history("support", 1).events[0].by == "127.0.0.1", "who does not say is where from"


UNROUTABLE = (
    ("PUT", "split", {"weights": {}}, 400, "invalid_request"),
    ("PUT", "split", {"weights": {"1": 0}}, 400, "invalid_request"),
    ("PUT", "split", {"weights": {"1": 0.5}}, 400, "invalid_request"),
    ("PUT", "split", {"weights": {"one": 1}}, 400, "invalid_request"),
    ("PUT", "split", {"weights": {str(n): 1 for n in range(1, 18)}}, 400, "invalid_request"),
    ("PUT", "split", {"weights": {"9": 1}}, 404, "version_not_found"),
    ("PUT", "split", {"weights": {"2": 1}}, 409, "illegal_transition"),
    ("PUT", "shadow", {"shares": {"1": 0}}, 400, "invalid_request"),
    ("PUT", "shadow", {"shares": {"1": 60, "2": 60}}, 400, "invalid_request"),
    ("PUT", "shadow", {"shares": {"9": 1}}, 404, "version_not_found"),
    ("PUT", "shadow", {"shares": {"2": 1}}, 409, "illegal_transition"),
    ("PUT", "shadow", {}, 400, "invalid_request"),
    ("PUT", "aliases/canary", {"version": 0}, 400, "invalid_request"),
    ("PUT", "aliases/canary", {"version": 2}, 409, "illegal_transition"),
    ("PUT", "aliases/2", {"version": 1}, 400, "invalid_request"),
    ("PUT", "aliases/latest", {"version": 1}, 400, "invalid_request"),
    ("DELETE", "aliases/previous", None, 400, "invalid_request"),
    ("POST", "rollback", None, 409, "no_routing_before"),
)


def test_what_cannot_be_routed_is_refused(registry, adapter):
    registry.verified(adapter(1))
    registry.push(adapter(2))
    before = registry.client.task("support")
    for method, path, body, status, code in UNROUTABLE:
        answer = registry.http.request(method, f"/v1/tasks/support/{path}", json=body)
        told = answer.json()["error"]["code"]
        assert (method, path, body, answer.status_code, told) == (method, path, body, status, code)
        assert registry.client.task("support") == before
        assert registry.http.request(method, f"/v1/tasks/nobody/{path}", json=body).status_code in (400, 404)
    assert registry.http.post("/v1/tasks/support/versions/1/retire").status_code == 200


def test_what_is_asked_and_answered_is_described(registry):
    described = registry.http.get("/openapi.json").json()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            told = operation["responses"]
            assert operation["description"], path
            assert all(each["description"] for each in operation.get("parameters", ())), path
            assert "default" in told
            assert all(each["description"] for each in told.values())
            if path.startswith("/v1/tasks/") and method != "get" and not path.endswith("probe"):
                assert {"200", "404"} <= told.keys() or "201" in told
            if any(p["name"].lower() == "if-match" for p in operation.get("parameters", ())):
                assert {"404", "409", "412"} <= told.keys()
    page = described["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert set(page) == {"text/plain"}
    schemas = described["components"]["schemas"]
    for body in ("Retire", "Weighted", "Shadowed", "Aliased", "Probe", "NewKey", "KeyLimits"):
        assert all(field["description"] for field in schemas[body]["properties"].values()), body
    assert schemas["Weighted"]["properties"]["weights"]["examples"] == [{"1": 90, "2": 10}]
    assert schemas["Aliased"]["properties"]["version"]["examples"] == [2]
    assert schemas["Routing"]["examples"][0]["aliases"] == {"canary": 2}


def test_an_operator_says_what_was_seen(registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    at = ["--registry", registry.url]
    assert "routing at revision 3\n" in prad("adapter", "show", "support", *at).output
    lost = prad("adapter", "promote", "support@2", "--if-revision", 2, *at)
    assert (lost.exit_code, "at revision 3, not 2: somebody changed it" in lost.output) == (1, True)
    assert prad("adapter", "promote", "support@2", "--if-revision", 3, *at).exit_code == 0
    assert prad("adapter", "retire", "support@1", "--if-revision", 3, *at).exit_code == 1
    assert registry.client.task("support").routing.default == 2


def test_a_condition_that_cannot_be_read_is_refused(registry, adapter):
    registry.verified(adapter(1))
    for value in ("", "soon", 'W/"3"', '"3", "4"', "-1", "9" * 40):
        refused = registry.http.post("/v1/tasks/support/versions/1/promote", headers={"If-Match": value})
        assert (value, refused.status_code) == (value, 400)
        assert refused.json()["error"]["code"] == "invalid_request"
        assert 'such as "41"' in refused.json()["error"]["message"]


def changed(store, stored_adapter):
    """What the first schema could say as well."""
    for task, seed in (("a", 1), ("a", 2), ("b", 1)):
        number, _ = store.push(task, stored_adapter(seed))
        store.change(task, Move(number, Event.PROBE_OK), by="prefill-1")
    store.change("a", Move(2, Event.PROMOTE))
    store.change("a", Move(1, Event.RETIRE), reason="worse")
    store.push("c", stored_adapter(3))
    store.change("b", Move(1, Event.RETIRE))
    return store


def older(snapshot):
    """An export as the first format had it: a current version, and no routing."""
    found = json.loads(snapshot.model_dump_json())
    for task in found["tasks"]:
        current = None
        lines = [line for version in task["versions"] for line in version["history"]]
        for line in sorted(lines, key=lambda line: line["revision"]):
            made = line.pop("routing")
            current = made["default"] if made else current
            line |= {"current": current, "replica": line.pop("by")}
            del line["version"]
        assert task.pop("history") == []
        routing = task.pop("routing")
        task |= {"current": current, "routing_revision": routing["revision"]}
    return found | {"format": 1}


def older_database(path, found, schema):
    """Of the first or the second schema."""
    with sqlite3.connect(path) as old:
        old.executescript(OLDEST)
        for task in found["tasks"]:
            old.execute("INSERT INTO tasks VALUES (?, ?)", (task["task"], task["current"]))
            for v in task["versions"]:
                files, base = json.dumps(v["files"]), json.dumps(v["record"]["base"])
                known = (v["record"]["method"], base, json.dumps(v["record"]), files)
                adapter = (v["digest"], *known, v["tensors"], v["tensor_bytes"])
                old.execute("INSERT OR IGNORE INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?)", adapter)
                version = (task["task"], v["version"], v["digest"], v["state"], v["reason"], v["pushed_at"])
                old.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", version)
                for h in v["history"]:
                    moved = (h["event"], h["before"], h["after"], h["current"], h["at"])
                    line = (h["revision"], task["task"], v["version"], *moved, h["replica"], h["reason"])
                    old.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", line)
        if schema == 2:
            old.execute("ALTER TABLE tasks ADD COLUMN routing_revision INTEGER NOT NULL DEFAULT 0")
        old.execute(f"PRAGMA user_version = {schema}")
    old.close()


def older_redis(url, found):
    with Redis.from_url(url) as client:
        head = {"schema": 1, "id": "an-older-one", "revision": found["revision"]}
        client.hset("{prad}:registry", mapping=head)
        for task in found["tasks"]:
            versions = []
            for v in task["versions"]:
                route = {name: v[name] for name in ("version", "state", "digest", "reason", "pushed_at")}
                route |= {"method": v["record"]["method"], "base": v["record"]["base"]}
                versions.append(route | {"changed": v["history"][-1]["revision"]})
                adapter = {name: v[name] for name in ("record", "files", "tensors", "tensor_bytes")}
                client.hset("{prad}:adapters", v["digest"], json.dumps(adapter))
                for line in v["history"]:
                    client.rpush(f"{{prad}}:history:{task['task']}@{v['version']}", json.dumps(line))
            stored = {name: task[name] for name in ("task", "current", "routing_revision")}
            client.hset("{prad}:tasks", task["task"], json.dumps(stored | {"versions": versions}))


def test_what_the_last_schemas_stored_becomes_todays(new_store, stored_adapter, redis, tmp_path):
    now = changed(new_store("sqlite"), stored_adapter)
    before = json.loads(now.dump().model_dump_json()) | {"format": 2}
    for task in before["tasks"]:
        for version in task["versions"]:
            del version["signatures"]
    imported = SqliteStore(tmp_path / "imported.sqlite3")
    imported.load(Snapshot.model_validate(before))
    assert imported.dump() == now.dump()
    imported.close()
    with sqlite3.connect(tmp_path / "imported.sqlite3") as older:
        older.execute("DROP TABLE keys")
        older.execute("ALTER TABLE adapters DROP COLUMN signatures")
        older.execute("ALTER TABLE versions DROP COLUMN warmed")
        older.execute("PRAGMA user_version = 3")
    older.close()
    store = RedisStore(redis.url)
    store.load(now.dump())
    store.close()
    with Redis.from_url(redis.url) as client:
        for digest, text in client.hgetall("{prad}:adapters").items():
            stored = json.loads(text)
            del stored["signatures"]
            client.hset("{prad}:adapters", digest, json.dumps(stored))
        client.hset("{prad}:registry", "schema", 2)
    for migrated in (SqliteStore(tmp_path / "imported.sqlite3"), RedisStore(redis.url)):
        assert migrated.dump() == now.dump()
        migrated.close()


@pytest.mark.parametrize("kind", ["sqlite 1", "sqlite 2", "redis 1", "export 1"])
def test_what_an_older_program_stored_becomes_todays(kind, new_store, stored_adapter, tmp_path, request):
    now = changed(new_store("sqlite"), stored_adapter)
    found = older(now.dump())
    if kind.startswith("sqlite"):
        older_database(tmp_path / "old.sqlite3", found, int(kind[-1]))
        migrated = SqliteStore(tmp_path / "old.sqlite3")
    elif kind == "redis 1":
        redis = request.getfixturevalue("redis")
        older_redis(redis.url, found)
        with ThreadPoolExecutor(3) as pool:  # several registries start at once, and one of them migrates
            migrated, *others = pool.map(lambda _: RedisStore(redis.url), range(3))
        for other in others:
            other.close()
    else:
        migrated = new_store("sqlite", "imported")
        migrated.load(Snapshot.model_validate_json(json.dumps(found)))
    assert migrated.dump() == now.dump()
    assert [task.routing.split for task in migrated.state().tasks] == [{2: 100}, {}, {}]
    assert [migrated.history(task) for task in "abc"] == [now.history(task) for task in "abc"]
    for store in (migrated, now):
        assert store.push("c", stored_adapter(4)) == (2, True)
        with pytest.raises(NoRoutingBeforeError, match="names a@1, which is retired"):
            store.change("a", Rollback())
    assert migrated.revision() == now.revision()
    migrated.close()


def test_older_data_that_come_back_to_a_running_registry_are_not_taken_for_todays(redis, stored_adapter):
    store = RedisStore(redis.url)
    store.push("a", stored_adapter(1))
    with Redis.from_url(redis.url) as client:
        client.hset("{prad}:registry", "schema", 1)
    with pytest.raises(StoreUnavailableError, match="restored meanwhile"):
        store.state()
    store.close()


@pytest.mark.parametrize("spoil", [lambda d: d.pop("tasks"), lambda d: d["tasks"][0].pop("versions")])
def test_an_older_export_that_makes_no_sense_is_refused(spoil, new_store, stored_adapter):
    found = older(changed(new_store("sqlite"), stored_adapter).dump())
    spoil(found)
    with pytest.raises(ValidationError, match="format 1 has another shape"):
        Snapshot.model_validate(found)


def test_a_newer_schema_is_refused_and_the_way_out_named(data_dir):
    data_dir.mkdir()
    with sqlite3.connect(data_dir / "registry.sqlite3") as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    newer.close()
    with pytest.raises(CannotStartError, match=r"has schema 5, this program knows 4 .*registry export FILE"):
        RegistryServer(RegistrySettings(port=0, data_dir=data_dir))
