"""Who may do what at the registry: every role against every route; how keys are made, kept, revoked."""

import json
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from types import SimpleNamespace

import httpx
import pytest
from redis import Redis
from typer.testing import CliRunner

from adapter_registry.access import Secrets
from adapter_registry.app import create_app
from adapter_registry.client import AsyncRegistryClient, RegistryClient
from adapter_registry.errors import (
    CannotStartError,
    RoleTooLowError,
    UnauthorizedError,
    WouldLockOutError,
)
from adapter_registry.keys import NewKey, Role, hashed, new_token
from adapter_registry.messages import RoutingState
from adapter_registry.metrics import Metrics
from adapter_registry.secret import ensure_secret
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from prad_cli.app import app
from tests.routes import routes_added

VERSION = "/v1/tasks/{task}/versions/{version}"
ALIAS = "/v1/tasks/{task}/aliases/{alias}"
NEEDED = {
    "GET /v1/state": Role.READ,
    "GET /v1/tasks": Role.READ,
    "GET /v1/tasks/{task}": Role.READ,
    "GET /v1/tasks/{task}/events": Role.READ,
    f"GET {VERSION}": Role.READ,
    f"GET {VERSION}/files/{{name}}": Role.READ,
    "GET /v1/changes": Role.READ,
    "GET /v1/replicas": Role.READ,
    "GET /v1/events": Role.READ,
    "GET /v1/events/stream": Role.READ,
    f"POST {VERSION}/probe": Role.REPLICA,
    "POST /v1/traffic": Role.REPLICA,
    "POST /v1/tasks/{task}/versions": Role.PUSH,
    f"POST {VERSION}/promote": Role.ROUTE,
    f"POST {VERSION}/retire": Role.ROUTE,
    f"POST {VERSION}/unretire": Role.ROUTE,
    "PUT /v1/tasks/{task}/split": Role.ROUTE,
    f"PUT {ALIAS}": Role.ROUTE,
    f"DELETE {ALIAS}": Role.ROUTE,
    "POST /v1/tasks/{task}/rollback": Role.ROUTE,
    "PUT /v1/tasks/{task}/shadow": Role.ROUTE,
    "POST /v1/tasks/{task}/versions/{version}/warm": Role.ROUTE,
    f"DELETE {VERSION}": Role.ADMIN,
    "GET /v1/keys": Role.ADMIN,
    "POST /v1/keys": Role.ADMIN,
    "DELETE /v1/keys/{name}": Role.ADMIN,
    "GET /metrics": Role.READ,
    "GET /health": None,
    "GET /ready": None,
    "GET /": None,
    "HEAD /": None,
    "HEAD /health": None,
    "HEAD /ready": None,
    "GET /version": None,
}
"""Of every route the role that it needs; None: it is for everybody."""

ALLOWED = {
    Role.COMPLETE: set(),
    Role.REPLICA: {Role.READ, Role.REPLICA},
    Role.READ: {Role.READ},
    Role.PUSH: {Role.READ, Role.PUSH},
    Role.ROUTE: {Role.READ, Role.PUSH, Role.ROUTE},
    Role.ADMIN: {Role.READ, Role.PUSH, Role.ROUTE, Role.ADMIN},
}


@pytest.fixture
def settings(data_dir, tmp_path):
    def make(**more):
        files = {"replica_secret_file": tmp_path / "replicas", "admin_token_file": tmp_path / "admin"}
        return RegistrySettings(**({"port": 0, "data_dir": data_dir, "log_level": "warning"} | files | more))

    return make


@contextmanager
def as_(registry, token):
    with RegistryClient(registry.url, token=token) as client:
        yield client


def here(registry):
    """One that listens on every address, by that of this machine."""
    return replace(registry, url=registry.url.replace("0.0.0.0", "127.0.0.1"))


def keys_of(registry, admin, **roles):
    with as_(registry, admin) as client:
        return {name: client.create_key(NewKey(name=name, role=role)).token for name, role in roles.items()}


def status(registry, route, token):
    """Of a call that changes nothing, as there is no such task or key, with its error's code."""
    method, _, path = route.partition(" ")
    path = path.format(task="none", version=1, alias="a", name="nobody")
    shown = {} if token is None else {"authorization": f"Bearer {token}".encode()}
    answer = registry.http.request(method, path, params={"after": -1, "wait": 0}, headers=shown)
    code = answer.json()["error"]["code"] if answer.is_error else None
    return answer.status_code, code, answer.headers.get("www-authenticate")


def test_every_route_says_which_role_it_needs(monkeypatch):
    found = routes_added(monkeypatch)
    create_app(SimpleNamespace(metrics=Metrics()), RegistrySettings(console=False), Secrets())
    assert found - {"GET /docs", "GET /docs/oauth2-redirect"} == {r.replace(" /v1/", " /") for r in NEEDED}


@pytest.mark.parametrize("role", [None, *Role])
def test_every_role_may_use_its_routes_and_no_other(settings, serving, role):
    with serving(settings()) as registry:
        with as_(registry, ensure_secret(settings().admin_token_file)) as client:
            client.create_key(NewKey(name="boss", role=Role.ADMIN))
            mine = {None: None, Role.REPLICA: ensure_secret(settings().replica_secret_file)}
            if role not in mine:
                mine[role] = client.create_key(NewKey(name="mine", role=role)).token
        for route, needed in NEEDED.items():
            found = status(registry, route, mine[role])
            if needed is None or (role is not None and needed in ALLOWED[role]):
                assert found[0] not in (401, 403), route
            elif needed is Role.REPLICA:
                assert found[:2] == (403, "not_a_replica"), route
            elif role in (None, Role.COMPLETE):
                assert found == (401, "unauthorized", "Bearer"), route
            else:
                assert found[:2] == (403, "role_too_low"), route


def test_a_token_of_nobodys_may_nothing(settings, serving):
    with serving(settings()) as registry:
        admin = ensure_secret(settings().admin_token_file)
        gone = keys_of(registry, admin, gone=Role.ADMIN)["gone"]
        with as_(registry, admin) as client:
            client.revoke_key("gone")
        for nobodys in (gone, new_token(), "x", "\u00e9", f"{admin} {admin}"):
            assert status(registry, "GET /v1/state", nobodys)[:2] == (401, "unauthorized")
        shown = {"authorization": f"Basic {admin}"}
        assert registry.http.get("/v1/state", headers=shown).status_code == 401


def test_this_machine_is_asked_from_the_first_operators_token_on(settings, serving, adapter):
    with serving(settings(admin_token_file=None)) as registry:
        registry.push(adapter(1))
        made = registry.client.create_key(NewKey(name="alice", tasks=("support",)))
        assert registry.client.task("support").task == "support", (
            "an API key closes the API, not the registry"
        )
        boss = registry.client.create_key(NewKey(name="boss", role=Role.ADMIN)).token
        with pytest.raises(UnauthorizedError, match=r"PRAD_TOKEN_FILE.*prad keys create NAME --role read"):
            registry.client.task("support")
        with as_(registry, made.token) as client, pytest.raises(UnauthorizedError):
            client.task("support")
        with as_(registry, boss) as client:
            pusher = client.create_key(NewKey(name="ci", role=Role.PUSH)).token
        with as_(registry, pusher) as client:
            with pytest.raises(RoleTooLowError, match=r"ci has role push, and this needs route"):
                client.promote("support", 1)
            assert client.version("support", 1).state == "pushed"
        with RegistryClient(registry.url, token=boss, operator="ada@desk") as client:
            client.retire("support", 1)
            assert client.history("support").events[-1].by == "boss (ada@desk)"
            known = client.keys()
            assert [(key.name, key.role, key.tasks, key.created_by) for key in known] == [
                ("alice", "complete", ("support",), "127.0.0.1"),
                ("boss", "admin", None, "127.0.0.1"),
                ("ci", "push", None, "boss (127.0.0.1)"),
            ]
            client.revoke_key("ci")
        with as_(registry, pusher) as client, pytest.raises(UnauthorizedError):
            client.state()
    with pytest.raises(CannotStartError, match="operators' tokens: it asks everyone for one, and must know"):
        RegistryServer(settings(replica_secret_file=None))
    with serving(settings()) as registry, pytest.raises(UnauthorizedError):
        registry.client.state()


def test_nobody_shuts_himself_out(settings, serving):
    boss, pusher = NewKey(name="boss", role=Role.ADMIN), NewKey(name="ci", role=Role.PUSH)
    with serving(settings(admin_token_file=None, replica_secret_file=None)) as registry:
        with pytest.raises(WouldLockOutError, match="start it with --replica-secret-file"):
            registry.client.create_key(boss)
        registry.client.create_key(NewKey(name="alice"))
    with serving(settings(admin_token_file=None)) as registry:
        with pytest.raises(WouldLockOutError, match="make one of role admin first"):
            registry.client.create_key(pusher)
        with as_(registry, registry.client.create_key(boss).token) as client:
            client.create_key(pusher)
            with pytest.raises(WouldLockOutError, match="make one of role admin first"):
                client.revoke_key("boss")
            client.create_key(NewKey(name="deputy", role=Role.ADMIN))
            assert client.revoke_key("boss").revoked_by == "boss (127.0.0.1)"
    with serving(settings()) as registry, as_(registry, ensure_secret(settings().admin_token_file)) as client:
        assert client.revoke_key("deputy").revoked_at is not None, "there is a file with another"


def test_beyond_this_machine_it_does_not_start_unprotected(settings, serving):
    with pytest.raises(CannotStartError, match="set replica_secret_file"):
        RegistryServer(settings(host="0.0.0.0", replica_secret_file=None))
    with pytest.raises(CannotStartError, match=r"set admin_token_file .*or say --unprotected"):
        RegistryServer(settings(host="0.0.0.0", admin_token_file=None))
    told_so = settings(host="0.0.0.0", unprotected=True, admin_token_file=None)
    with serving(told_so) as registry, as_(here(registry), "") as client:
        assert client.state().tasks == (), "as it was told to"
    with serving(settings(host="0.0.0.0")) as registry:
        with as_(here(registry), "") as client, pytest.raises(UnauthorizedError):
            client.state()
        boss = keys_of(here(registry), ensure_secret(settings().admin_token_file), boss=Role.ADMIN)["boss"]
    with_a_key = settings(host="0.0.0.0", admin_token_file=None)
    with serving(with_a_key) as registry, as_(here(registry), boss) as client:
        (key,) = client.keys()
        assert key.name == "boss"


async def test_no_token_is_kept_and_only_replicas_see_hashes(settings, serving, data_dir, tmp_path):
    with serving(settings()) as registry:
        made = registry.http.post("/v1/keys", json={"name": "alice", "tasks": ["support"]})
        token = made.json()["token"]
        assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
        kept = sha256(token.encode()).hexdigest()
        told = [registry.http.get(path).text for path in ("/v1/keys", "/v1/state", "/v1/tasks")]
        assert (registry.client.state().keys, registry.client.tasks().keys) == (None, None)
        told += [made.text, registry.http.get("/v1/changes", params={"after": -1}).text]
        assert not [text for text in told if kept in text]
        assert not [text for text in told[:3] if token in text]
        files = [path for path in data_dir.rglob("*") if path.is_file()]
        assert [path for path in files if kept.encode() in path.read_bytes()], "its hash is"
        assert not [path for path in files if token.encode() in path.read_bytes()]
        async with AsyncRegistryClient(
            registry.url,
            cache_dir=tmp_path,
            replica="prefill-1",
            secret=ensure_secret(settings().replica_secret_file),
        ) as replica:
            state = await replica.state()
            assert [(key.name, key.sha256) for key in state.keys] == [("alice", kept)]
            assert (await replica.changes(state.revision - 1)).keys == state.keys


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"name": "a b"}, "name"),
        ({"name": "a", "role": "replica"}, "no key is made for them"),
        ({"name": "a", "role": "boss"}, "role"),
        ({"name": "a", "role": "read", "tasks": ["t"]}, "are an API key's"),
        ({"name": "a", "role": "read", "limits": {"concurrent": 1}}, "are an API key's"),
        ({"name": "a", "tasks": []}, "tasks"),
        ({"name": "a", "tasks": ["t@2"]}, "tasks"),
        ({"name": "a", "limits": {"concurrent": 0}}, "concurrent"),
        ({"name": "a", "limits": {"per_day": 5}}, "per_day"),
        ({"name": "a", "token": "prad_mine"}, "token"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(registry, wanted, said):
    refused = registry.http.post("/v1/keys", json=wanted)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
    assert said in refused.json()["error"]["message"]
    assert registry.client.keys() == ()


def test_a_web_page_makes_no_keys(registry):
    page = {"origin": "http://evil.example"}
    assert registry.http.post("/v1/keys", json={"name": "a"}, headers=page).status_code == 403
    assert registry.http.delete("/v1/keys/a", headers=page).status_code == 403


def test_registries_on_one_redis_refuse_what_one_revoked(settings, serving, redis, data_dir):
    shared = settings(redis_url=redis.url)
    with serving(shared) as one, serving(shared) as other:
        boss = keys_of(one, ensure_secret(shared.admin_token_file), boss=Role.ADMIN, ci=Role.READ)
        while status(other, "GET /v1/tasks", None)[0] == 200:
            pass  # until it has heard of the first
        while status(other, "GET /v1/tasks", boss["ci"])[0] != 200:
            pass
        with as_(one, boss["boss"]) as client:
            client.revoke_key("ci")
        assert status(one, "GET /v1/tasks", boss["ci"])[0] == 401
        while status(other, "GET /v1/tasks", boss["ci"])[0] != 401:
            pass
    with Redis.from_url(redis.url) as client:
        kept = b"".join(client.dump(key) for key in client.keys("*"))
    assert not [token for token in boss.values() if token.encode() in kept]


def test_an_older_registrys_state_has_no_keys():
    assert RoutingState.model_validate({"revision": 1, "tasks": []}).keys == ()
    assert hashed("prad_x") == sha256(b"prad_x").hexdigest()
    assert len({new_token() for _ in range(10)}) == 10


def prad(registry, *arguments, **environment):
    known = {"PRAD_REGISTRY_URL": registry.url, "COLUMNS": "200"}
    return CliRunner().invoke(app, ["keys", *arguments], env=known | environment)


def test_the_command_makes_lists_and_revokes(settings, serving, tmp_path):
    with serving(settings()) as registry:
        assert "No keys. Make one" in prad(registry, "list").stdout
        limits = ("--requests-per-minute", "60", "--concurrent", "2")
        said = prad(registry, "create", "alice", "--task", "support", "--task", "e2e", *limits).stdout
        assert "'alice': role complete, for support, e2e, 60 requests/min, 2 at once. This is its" in said
        assert said.splitlines()[-1].startswith("prad_")
        file = {"PRAD_TOKEN_FILE": str(settings().admin_token_file)}
        made = json.loads(prad(registry, "create", "ci", "--role", "push", "--json", **file).stdout)
        assert (made["role"], made["revoked_at"], made["pending"]) == ("push", None, [])
        refused = prad(registry, "list")
        assert (refused.exit_code, "PRAD_TOKEN_FILE" in refused.stderr) == (1, True)
        refused = prad(registry, "list", PRAD_TOKEN=made["token"])
        assert "ci has role push, and this needs admin" in refused.stderr
        assert "is revoked" in prad(registry, "revoke", "ci", **file).stdout
        (alice, ci) = json.loads(prad(registry, "list", "--json", **file).stdout)
        assert (alice["limits"]["concurrent"], ci["revoked_at"] is None) == (2, False)
        table = prad(registry, "list", **file).stdout
        assert "support, e2e" in table
        assert not {made["token"], "prad_"} & set(table.split())
        assert "there is no key 'bob'" in prad(registry, "revoke", "bob", **file).stderr
        missing = prad(registry, "list", PRAD_TOKEN_FILE=str(tmp_path / "none"))
        assert "cannot read the file that PRAD_TOKEN_FILE names" in missing.stderr
        for wrong in (("bob", "--role", "replica"), ("bob", "--role", "read", "--task", "a"), ("b b",)):
            assert prad(registry, "create", *wrong, **file).exit_code == 2
        said = prad(registry, "create", "bad name", **file).output
        assert "expected 1 to 64 letters, digits and" in said
        assert httpx.get(f"{registry.url}/v1/state").status_code == 401
