"""The console's pages and actions as HTTP: who may, what is shown, what is refused; texts stay texts."""

import re
from hashlib import sha256
from html import unescape
from types import SimpleNamespace

import pytest

from adapter_registry.access import Secrets
from adapter_registry.app import create_app
from adapter_registry.client import RegistryClient
from adapter_registry.console import create_console
from adapter_registry.console.rendering import STATIC
from adapter_registry.keys import NewKey, Role
from adapter_registry.messages import TIMES
from adapter_registry.metrics import Metrics
from adapter_registry.secret import ensure_secret
from adapter_registry.settings import RegistrySettings
from adapter_registry.traffic import SLOT_S, LiveTraffic
from tests.routes import routes_added

VERSION = "/tasks/{task}/versions/{version}"
NEEDED = {
    "GET /": Role.READ,
    "GET /now": Role.READ,
    "GET /tasks/{task}": Role.READ,
    "GET /tasks/{task}/now": Role.READ,
    "GET /data": Role.READ,
    "GET /replicas": Role.READ,
    "GET /replicas/now": Role.READ,
    "GET /log": Role.READ,
    "GET /push": Role.PUSH,
    "GET /playground": Role.READ,
    "POST /playground/ask": Role.READ,
    "POST /push": Role.PUSH,
    f"GET {VERSION}/promote": Role.ROUTE,
    f"POST {VERSION}/promote": Role.ROUTE,
    f"GET {VERSION}/retire": Role.ROUTE,
    f"POST {VERSION}/retire": Role.ROUTE,
    f"POST {VERSION}/warm": Role.ROUTE,
    f"POST {VERSION}/unretire": Role.ROUTE,
    "POST /tasks/{task}/split": Role.ROUTE,
    "POST /tasks/{task}/shadow": Role.ROUTE,
    "POST /tasks/{task}/alias": Role.ROUTE,
    "GET /tasks/{task}/rollback": Role.ROUTE,
    "POST /tasks/{task}/rollback": Role.ROUTE,
    "GET /keys": Role.ADMIN,
    "POST /keys": Role.ADMIN,
    "GET /keys/{name}/revoke": Role.ADMIN,
    "POST /keys/{name}/revoke": Role.ADMIN,
    "GET /log/keys": Role.ADMIN,
    f"GET {VERSION}/delete": Role.ADMIN,
    f"POST {VERSION}/delete": Role.ADMIN,
    "GET /sign-in": None,
    "POST /sign-in": None,
    "POST /sign-out": None,
}
"""Of every route the role that it needs; None: it is for everybody."""

OPERATORS = (Role.READ, Role.PUSH, Role.ROUTE, Role.ADMIN)
IN_PLACE = {"hx-request": "true"}


def test_every_route_says_which_role_it_needs(monkeypatch):
    found = routes_added(monkeypatch)
    registry = SimpleNamespace(metrics=Metrics())
    create_console(registry, RegistrySettings(), Secrets(), LiveTraffic())
    assert found == set(NEEDED)


def test_what_is_of_others_is_listed_and_as_it_came():
    notice = (STATIC / "NOTICE.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w.]+)` .*`([0-9a-f]{64})` \|$", notice, re.MULTILINE))
    found = {path.name for path in STATIC.iterdir()}
    assert found == {*listed, "NOTICE.md", "console.css", "console.js", "playground.js", "icon.svg"}
    assert listed == {name: sha256((STATIC / name).read_bytes()).hexdigest() for name in listed}


def test_it_can_be_off(serving, data_dir):
    found = create_app(SimpleNamespace(metrics=Metrics()), RegistrySettings(console=False), Secrets())
    assert not [route for route in found.routes if getattr(route, "path", "") == "/console"]
    with serving(RegistrySettings(port=0, data_dir=data_dir, console=False)) as registry:
        assert registry.http.get("/console/").status_code == 404


@pytest.fixture
def closed(serving, data_dir, tmp_path):
    """closed() serves a registry with operators' tokens: yields it, and a token of each role."""
    files = {"replica_secret_file": tmp_path / "replicas", "admin_token_file": tmp_path / "admin"}
    settings = RegistrySettings(port=0, data_dir=data_dir, log_level="warning", **files)
    with serving(settings) as registry:
        admin = ensure_secret(tmp_path / "admin")
        tokens = {}
        with RegistryClient(registry.url, token=admin) as client:
            for role in (Role.COMPLETE, *reversed(OPERATORS)):
                tokens[role] = client.create_key(NewKey(name=f"the-{role}", role=role)).token
        yield registry, tokens


def asked(registry, route, token):
    method, _, path = route.partition(" ")
    path = "/console" + path.format(task="none", version=1, name="nobody")
    cookies = {} if token is None else {"cookie": f"prad_token={token}"}
    return registry.http.request(method, path, headers=cookies, data={} if method == "POST" else None)


@pytest.mark.parametrize("role", [None, Role.COMPLETE, *OPERATORS])
def test_every_role_may_use_its_pages_and_no_other(closed, role):
    registry, tokens = closed
    for route, needed in NEEDED.items():
        answer = asked(registry, route, tokens.get(role))
        if needed is None or (role in OPERATORS and needed in OPERATORS[: OPERATORS.index(role) + 1]):
            assert "<h1>Sign in</h1>" in answer.text or answer.status_code not in (401, 403), route
        elif role in OPERATORS:
            assert (answer.status_code, f"this needs {needed}" in answer.text) == (403, True), route
        else:
            assert (answer.status_code, "<h1>Sign in</h1>" in answer.text) == (401, True), route


def test_the_cookie_opens_the_console_only(closed):
    registry, tokens = closed
    cookie = {"cookie": f"prad_token={tokens[Role.ADMIN]}"}
    assert registry.http.get("/console/", headers=cookie).status_code == 200
    assert registry.http.get("/v1/tasks", headers=cookie).status_code == 401
    shown = {"authorization": f"Bearer {tokens[Role.READ]}"}
    assert registry.http.get("/console/", headers=shown).status_code == 200


def test_who_signs_in_is_known_until_he_signs_out(closed):
    registry, tokens = closed
    refused = registry.http.post("/console/sign-in", data={"token": "prad_nobodys"})
    assert (refused.status_code, refused.cookies) == (401, {})
    assert "No operator has this token" in refused.text
    assert registry.http.post("/console/sign-in", data={"token": tokens[Role.COMPLETE]}).status_code == 401
    came = registry.http.post("/console/sign-in", data={"token": tokens[Role.ROUTE]})
    assert (came.status_code, came.headers["location"]) == (303, "/console/")
    kept = came.headers["set-cookie"]
    assert {"HttpOnly", "Path=/console", "SameSite=strict"} <= set(kept.split("; "))
    assert "max-age" not in kept.lower()
    page = registry.http.get("/console/").text
    assert "the-route" in page
    assert ">Push</a>" in page
    assert ">Keys</a>" not in page
    assert registry.http.post("/console/sign-out").status_code == 303
    assert registry.http.get("/console/").status_code == 401
    away = registry.http.get("/console/now", headers=IN_PLACE)
    assert (away.status_code, away.headers["hx-redirect"]) == (401, "/console/sign-in")


def test_only_what_one_may_do_is_offered(closed, adapter):
    registry, tokens = closed
    with RegistryClient(registry.url, token=tokens[Role.ADMIN]) as client:
        pushed = {name: (name, path.read_bytes()) for name, path in files(adapter(1))}
        assert client.state().tasks == ()
        answer = registry.http.post(
            "/console/push?task=support", files=list(as_parts(pushed)), headers=shown(tokens[Role.PUSH])
        )
        assert answer.status_code == 200
    for role, offered in ((Role.READ, False), (Role.PUSH, False), (Role.ROUTE, True), (Role.ADMIN, True)):
        page = registry.http.get("/console/tasks/support", headers=shown(tokens[role])).text
        assert ("/retire" in page, "/delete" in page) == (offered, role is Role.ADMIN)


def shown(token):
    return {"cookie": f"prad_token={token}"}


def files(folder):
    return [(path.name, path) for path in sorted(folder.iterdir())]


def as_parts(pushed):
    return (("files", part) for part in pushed.values())


@pytest.mark.parametrize("route", sorted(route for route in NEEDED if route.startswith("POST")))
def test_a_web_page_of_elsewhere_changes_nothing(registry, route):
    path = "/console" + route.partition(" ")[2].format(task="a", version=1, name="a")
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        refused = registry.http.post(path, headers={"origin": origin})
        assert (refused.status_code, "may not change this registry" in refused.text) == (403, True)


def test_every_answer_lets_scripts_of_its_own_run_and_no_others(registry):
    paths = ("/", "/sign-in", "/static/console.js", "/nowhere", "/data", "/tasks/none")
    for path in paths:
        answer = registry.http.get(f"/console{path}")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        if "html" in answer.headers["content-type"]:
            assert answer.headers["cache-control"] == "no-store"
            assert not re.search(
                r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=|javascript:|https?://", answer.text
            )


def test_an_unknown_page_and_a_wrong_form_are_refused_in_words(registry, adapter):
    registry.verified(adapter(1))
    assert (missing := registry.http.get("/console/tasks/nobody")).status_code == 404
    assert "there is no task" in unescape(missing.text)
    assert "'nobody'" in unescape(missing.text)
    for path, form, said in (
        ("split", {"revision": "x"}, "revision"),
        ("split", {"revision": 2, "version": "1", "weight": "0"}, "a split needs a version"),
        ("split", {"revision": 2, "version": ["1", "2"], "weight": "1"}, "a value for each version"),
        ("shadow", {"revision": 2, "version": "1", "share": "101"}, "percents of the requests"),
        ("alias", {"revision": 3, "name": "latest", "version": "1"}, "nobody sets the alias 'latest'"),
    ):
        refused = registry.http.post(f"/console/tasks/support/{path}", data=form, headers=IN_PLACE)
        assert (refused.status_code, refused.headers["hx-retarget"]) == (400, "#notice"), path
        assert said in unescape(refused.text)
    huge = registry.http.post("/console/tasks/support/alias", data={"name": "a" * 100_000})
    assert huge.status_code == 413


def routing(registry, task="support"):
    return registry.client.task(task).routing


def test_routing_is_changed_as_by_the_api(registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))

    def change(path, **form):
        revision = routing(registry).revision
        answer = registry.http.post(
            f"/console/tasks/support/{path}", data={"revision": revision, **form}, headers=IN_PLACE
        )
        assert answer.status_code == 200, answer.text
        return unescape(answer.text)

    assert "support now means 1=70 2=30" in change("split", version=["1", "2"], weight=["70", "30"])
    change("alias", name="canary", version="2")
    change("shadow", version="2", share="5")
    assert (routing(registry).split, routing(registry).aliases) == ({1: 70, 2: 30}, {"canary": 2})
    assert routing(registry).shadow == {2: 5.0}
    said = registry.http.get("/console/tasks/support/versions/2/promote").text
    assert "prad adapter diff support@1 support@2 --data FILE" in said
    change("versions/2/promote")
    assert routing(registry).split == {2: 100}
    assert "1=70 2=30" in registry.http.get("/console/tasks/support/rollback").text
    change("rollback")
    assert routing(registry).split == {1: 70, 2: 30}
    change("alias", name="canary")
    assert routing(registry).aliases == {}
    change("shadow", version=["2", "2"], share=["5", "0"])
    assert routing(registry).shadow == {}
    refused = registry.http.post(
        "/console/tasks/support/versions/1/retire",
        data={"revision": routing(registry).revision},
        headers=IN_PLACE,
    )
    assert refused.status_code == 409
    change("versions/1/retire", force="true")
    assert registry.client.version("support", 1).state == "retired"
    assert "is deleted" not in change("versions/1/delete")
    assert registry.client.version("support", 1).state == "deleted"
    assert "no prefill replica is connected" in change("versions/2/warm")
    log = registry.http.get("/console/log").text
    assert all(f"<strong>{event}</strong>" in log for event in ("push", "split", "rollback", "delete"))


def test_of_two_operators_the_slower_one_is_told(registry, adapter):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    seen = routing(registry).revision
    registry.client.split("support", {1: 50, 2: 50})
    refused = registry.http.post(
        "/console/tasks/support/versions/2/promote", data={"revision": seen}, headers=IN_PLACE
    )
    assert (refused.status_code, refused.headers["hx-retarget"]) == (412, "#notice")
    assert "somebody changed it meanwhile" in refused.text
    assert "Nothing was changed" in refused.text
    assert routing(registry).split == {1: 50, 2: 50}
    now = registry.http.get("/console/tasks/support/now", params={"seen": seen}).text
    assert "The routing changed meanwhile" in now


def test_texts_of_others_stay_texts(registry, adapter, tmp_path):
    evil = "<script>alert(1)</script>"
    folder = adapter(1)
    record = (folder / "prad.json").read_text(encoding="utf-8")
    (folder / "prad.json").write_text(record.replace('"MIT"', f'"{evil}"'), encoding="utf-8")
    (folder / "README.md").write_text(f"# {evil}\n<img src=x onerror=alert(1)>", encoding="utf-8")
    registry.verified(adapter(2))
    registry.push(folder)
    registry.probe("support@2", ok=False, reason=f"it said {evil}")
    registry.http.get("/v1/changes", params={"after": -1, "replica": evil, "trouble": f"support@2: {evil}"})
    registry.client.create_key(NewKey(name="alice"))
    pages = ["/", "/tasks/support", "/tasks/support/versions/2/promote", "/replicas", "/log", "/log/keys"]
    pages += [f"/?q={evil}", f"/push?task={evil}", f"/playground?a={evil}", f"/tasks/{evil}"]
    found = [registry.http.get(f"/console{page}").text for page in pages]
    assert not [text for text in found if evil in text or "<img src=x" in text]
    assert sum("&lt;script&gt;" in text for text in found) >= 6
    refused = registry.http.post(f"/console/push?task={evil}", files=list(as_parts(parts(adapter(3)))))
    assert (refused.status_code, evil in refused.text) == (400, False)


def parts(folder):
    return {name: (name, path.read_bytes()) for name, path in files(folder)}


def test_a_push_is_taken_or_refused_in_the_registrys_words(registry, adapter):
    pushed = registry.http.post("/console/push?task=support", files=list(as_parts(parts(adapter(1)))))
    assert "Pushed as <strong>support@1</strong>" in pushed.text
    again = registry.http.post("/console/push?task=support", files=list(as_parts(parts(adapter(1)))))
    assert "are <strong>support@1</strong> already" in again.text
    wrong = [("files", ("model.pkl", b"x"))]
    refused = registry.http.post("/console/push?task=support", files=wrong, headers=IN_PLACE)
    assert refused.status_code == 400
    said = registry.http.post("/v1/tasks/support/versions", files=wrong).json()["error"]["message"]
    assert said in unescape(refused.text)
    path = {"path": str(adapter(2))}
    assert registry.http.post("/console/push?task=support", json=path).status_code == 400
    assert len(registry.client.task("support").versions) == 1


def test_a_keys_token_is_shown_once(registry):
    form = {"name": "alice", "tasks": "support, e2e", "requests_per_minute": "60", "concurrent": ""}
    made = registry.http.post("/console/keys", data=form)
    (token,) = set(re.findall(r"prad_[A-Za-z0-9_-]{20,}", made.text))
    assert made.headers["cache-control"] == "no-store"
    (key,) = registry.client.keys()
    assert (key.name, key.tasks, key.limits.requests_per_minute) == ("alice", ("support", "e2e"), 60)
    assert token not in registry.http.get("/console/keys").text
    refused = registry.http.post("/console/keys", data={"name": "alice"}, headers=IN_PLACE)
    assert (refused.status_code, "there is a key" in refused.text) == (409, True)
    wrong = {"name": "bob", "role": "read", "tasks": "a"}
    assert "are an API key's" in unescape(registry.http.post("/console/keys", data=wrong).text)
    locking = registry.http.post("/console/keys", data={"name": "ci", "role": "push"})
    assert (locking.status_code, "--replica-secret-file" in locking.text) == (409, True)
    assert "Revoke alice" in registry.http.get("/console/keys/alice/revoke").text
    assert "alice is revoked" in registry.http.post("/console/keys/alice/revoke").text
    assert registry.http.get("/console/keys/bob/revoke").status_code == 404
    assert "key revoked" in registry.http.get("/console/log/keys").text


def test_many_tasks_come_in_pages_and_are_found(registry, adapter):
    folder = adapter(1)
    for number in range(53):
        registry.push(folder, f"task-{number:02d}")
    first = registry.http.get("/console/").text
    assert ("task-00" in first, "task-52" in first, "1 of 2" in first) == (True, False, True)
    assert "task-52" in registry.http.get("/console/", params={"page": 2}).text
    found = registry.http.get("/console/", params={"q": "K-41"}).text
    assert ("task-41" in found, "task-40" in found) == (True, False)
    assert registry.http.get("/console/", params={"page": 0}).status_code == 400


def test_live_traffic_is_drawn_and_stands_beside_a_promotion(registry, adapter, monkeypatch):
    for seed in (1, 2):
        registry.verified(adapter(seed))
    now = [1_000_000.0]
    monkeypatch.setattr(LiveTraffic, "now", lambda _: now[0])
    monkeypatch.setattr(LiveTraffic, "_now", lambda _: int(now[0]) // SLOT_S)
    times = [0] * (len(TIMES) + 1)
    times[TIMES.index(0.2)] = 30
    answered = {"task": "support", "version": 1, "requests": 30, "failed": 3, "tokens": 900}
    answered |= {"first_token": times, "duration": times}
    shadowed = {"task": "support", "version": 1, "shadow": 2, "compared": 8, "equal": 6, "tokens": 100}
    shadowed |= {"equal_tokens": 80, "dropped": 1, "live_first": times, "shadow_first": times}
    report = {"versions": [answered], "shadows": [shadowed]}
    assert registry.http.post("/v1/traffic", json=report).status_code == 204
    now[0] += SLOT_S
    drawn = registry.http.get("/console/data", params={"task": "support"}).json()
    assert drawn["times"][-1] == 1_000_010
    (line,) = drawn["requests"]
    assert (line["label"], line["values"][-1], sum(line["values"])) == ("@1", 3.0, 3.0)
    assert drawn["agreement"][0]["values"][-1] == 75.0
    assert 0.15 < drawn["latency"][0]["values"][-1] <= 0.2
    hour = registry.http.get("/console/data", params={"task": "support", "minutes": 60}).json()
    assert (len(hour["times"]), len(drawn["times"])) == (60, 90)
    everything = registry.http.get("/console/data").json()
    assert [line["values"][-1] for line in everything["requests"]] == [2.7, 0.3]
    evidence = " ".join(registry.http.get("/console/tasks/support/versions/2/promote").text.split())
    assert "<strong>75 %</strong> of 8 answers alike, 80 % of tokens" in evidence
    assert "10 %" in registry.http.get("/console/").text
    wrong = report | {"versions": [answered | {"first_token": [0]}]}
    assert registry.http.post("/v1/traffic", json=wrong).status_code == 400
