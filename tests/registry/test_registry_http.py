"""Errors in one shape, service endpoints, and the long poll."""

import json
import re
import threading
from itertools import islice

import httpx
import pytest

from adapter_registry.client import RegistryClient
from adapter_registry.settings import RegistrySettings


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("DELETE", "/v1/state", 405),
        ("GET", "/v1/tasks/x/versions/none", 400),
        ("GET", "/v1/tasks/x/versions/0", 400),
        ("GET", "/v1/changes", 400),
        ("POST", "/v1/tasks/x/versions/1/probe", 400),
        ("POST", "/v1/tasks/x/versions/1/promote", 404),
    ],
)
def test_every_error_has_one_shape(registry, method, path, status):
    response = registry.http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_slip_in_a_path_is_told_with_the_one_that_was_meant(registry):
    told = registry.http.get("/v1/task").json()["error"]["message"]
    assert told == "there is no /v1/task: did you mean /v1/tasks? GET / says where things are"
    told = registry.http.delete("/v1/state").json()["error"]["message"]
    assert told == "DELETE is not possible on /v1/state: expected GET"


def test_what_is_repeated_in_an_error_is_cut(registry, adapter):
    folder, long = adapter(1), "e" * 15_000
    record = json.loads((folder / "prad.json").read_text(encoding="utf-8"))
    (folder / "prad.json").write_text(json.dumps({**record, "template": long}), encoding="utf-8")
    retire = "/v1/tasks/x/versions/1/retire"
    for answer in (
        registry.http.post(f"/v1/tasks/{long}/versions", json={"path": str(folder)}),
        registry.http.post("/v1/tasks/x/versions", json={"path": str(folder)}),
        registry.http.post(retire, json={f"field-{n}": 0 for n in range(3000)}),
        registry.http.post(retire, json={long: 0}),
        registry.http.get(f"/{long}"),
    ):
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 2500


@pytest.mark.parametrize(
    "sent", [b'{"\\ud800": 0}', b'{"force": "\\ud800"}', b'{"force": "\xff"}', b"[" * 20_000]
)
def test_texts_that_are_none_are_refused_as_such(registry, sent):
    answer = registry.http.post(
        "/v1/tasks/x/versions/1/retire", content=sent, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_failed_request_is_a_line_in_the_log(registry, caplog):
    registry.http.post("/v1/tasks/nosuch/versions/1/promote")
    registry.http.get("/v1/tasks/x/versions/0")
    registry.http.get("/health", headers={"host": "evil.example"})
    lines = [record.getMessage() for record in caplog.records if record.name == "adapter_registry.replies"]
    assert [line.split(": ")[0] for line in lines[:2]] == [
        '"POST /v1/tasks/nosuch/versions/1/promote" failed',
        '"GET /v1/tasks/x/versions/0" failed',
    ]
    assert "status=400 code=invalid_request" in lines[1]
    assert "status=403 code=host_not_allowed" in lines[2]
    assert all("\n" not in line for line in lines)


def test_the_documentation_needs_no_other_server(registry):
    sources = re.findall(r'(?:src|href)="([^"]+)"', registry.http.get("/docs").text)
    assert len(sources) >= 2
    assert all(registry.http.get(source).status_code == 200 for source in sources)
    assert '"422"' not in registry.http.get("/openapi.json").text


def test_a_failure_of_its_own_has_that_shape_too(registry, adapter):
    folder = adapter(1)
    (registry.data / "staging").rmdir()
    response = registry.http.post("/v1/tasks/x/versions", json={"path": str(folder)})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")


def test_service_endpoints(registry, adapter):
    registry.verified(adapter(1))
    assert registry.http.get("/health").json() == {"status": "ok"}
    assert registry.http.get("/ready").json() == {"status": "ready", "revision": 3}
    assert registry.http.get("/version").json()["api"] == "v1"
    page = registry.http.get("/metrics").text
    assert 'prad_registry_versions{state="routable"} 1.0' in page
    assert 'prad_registry_pushes_total{outcome="created"} 1.0' in page


def test_load_balancers_may_ask_with_head(registry):
    for path in ("/", "/health", "/ready"):
        answer = registry.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_the_root_says_where_things_are(registry):
    places = registry.http.get("/").json()
    for name in ("docs", "openapi", "tasks", "health", "ready", "metrics"):
        assert registry.http.get(places[name]).status_code == 200


def test_changes_answer_at_once_when_there_are_some(registry, adapter):
    registry.push(adapter(1))
    assert registry.client.changes(0).revision == 1
    # Another revision, not only a later one: the data of a registry can be gone.
    assert registry.client.changes(57).revision == 1


def test_changes_are_none_when_nothing_happens(registry):
    assert registry.client.changes(0, 0.05) is None


def test_a_waiter_is_woken_by_a_push(registry, adapter):
    answers = []
    waiter = threading.Thread(target=lambda: answers.append(registry.client.changes(0, 20)))
    waiter.start()
    while "prad_registry_waiters 1.0" not in registry.http.get("/metrics").text:
        pass
    registry.push(adapter(1))
    waiter.join()
    assert answers[0].tasks[0].versions[0].state == "pushed"


def test_waiters_are_bounded_and_sent_home_at_the_end(data_dir, serving):
    settings = RegistrySettings(port=0, data_dir=data_dir, max_waiters=1, log_level="warning")
    answers = []

    def wait(url):
        with RegistryClient(url) as client:
            answers.append(client.changes(0, 30))

    with serving(settings) as registry:
        waiter = threading.Thread(target=wait, args=(registry.url,))
        waiter.start()
        while "prad_registry_waiters 1.0" not in registry.http.get("/metrics").text:
            pass
        refused = registry.http.get("/v1/changes", params={"after": 0})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_waiters")
    waiter.join()
    assert answers == [None]


def test_tasks_come_in_pages(registry, adapter):
    for name in ("c", "a", "b"):
        registry.push(adapter(1), task=name)
    pages, after = [], ""
    while not pages or after:
        page = registry.http.get("/v1/tasks", params={"limit": 2, "after": after}).json()
        pages.append([task["task"] for task in page["tasks"]])
        after = page["next"]
    assert pages == [["a", "b"], ["c"]]
    every = registry.http.get("/v1/tasks").json()
    assert ([task["task"] for task in every["tasks"]], every["next"]) == (["a", "b", "c"], "")
    assert every["keys"] is None
    assert registry.http.get("/v1/tasks", params={"limit": 0}).status_code == 400


def test_the_audit_log_is_of_all_tasks(registry, adapter):
    for name in ("a", "b"):
        registry.push(adapter(1), task=name)
    told = registry.http.get("/v1/events", params={"latest": 2}).json()["events"]
    assert [(line["task"], line["event"], line["revision"]) for line in told] == [
        ("a", "push", 1),
        ("b", "push", 2),
    ]


def test_changes_are_told_as_they_are_made(registry, adapter):
    registry.push(adapter(1), task="before")
    with registry.http.stream("GET", "/v1/events/stream", timeout=30) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        assert next(lines).startswith(":"), "now it is followed"
        registry.push(adapter(2), task="support")
        registry.probe("support@1")
        found = list(islice((line for line in lines if line and not line.startswith(":")), 9))
    assert found[:2] == ["id: 2", "event: push"]
    assert json.loads(found[2].removeprefix("data: "))["task"] == "support"
    assert found[4] == "event: probe_ok"
    assert found[6:8] == ["id: 4", "event: promote"], "a first version is promoted by its probe"
    late = registry.http.get(
        "/v1/events/stream", params={"wait": 0}, headers={"last-event-id": "2"}
    ).text.splitlines()
    assert [line for line in late if line.startswith("id")] == ["id: 3", "id: 4"]


def test_who_is_told_of_changes_is_sent_home_at_the_end(data_dir, serving):
    told = []

    def follow(url):
        with httpx.stream("GET", f"{url}/v1/events/stream", timeout=30) as stream:
            told.extend(line for line in stream.iter_lines() if line)

    with serving(RegistrySettings(port=0, data_dir=data_dir, log_level="warning")) as registry:
        follower = threading.Thread(target=follow, args=(registry.url,))
        follower.start()
        while "prad_registry_waiters 1.0" not in registry.http.get("/metrics").text:
            pass
    follower.join()
    assert told == [": what is changed from now on"]
