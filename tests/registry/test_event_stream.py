"""Changes as they are told to programs: each once and in order, at a bounded cost, and only who may know."""

import json
import threading
from itertools import islice

import httpx
import pytest

from adapter_registry import log
from adapter_registry.changes import ChangeFeed
from adapter_registry.errors import StoreUnavailableError
from adapter_registry.planning import Move
from adapter_registry.settings import RegistrySettings
from adapter_registry.versions import Event

STREAM = "/v1/events/stream"


class Told:
    """What a stream asks of a registry. `away`: how often its store does not answer."""

    def __init__(self, store):
        self.store = store
        self.feed = ChangeFeed(store.revision(), 8, 8)
        self.away = 0
        self.pages = []

    async def log_since(self, after, upto, most):
        if self.away:
            self.away -= 1
            raise StoreUnavailableError("away")
        lines, reached = self.store.log_since(after, upto, most)
        self.pages.append(len(lines))
        return lines, reached

    def stream(self, after=0, seconds=None):
        return log._told(self, after, seconds, self.allowed)

    async def allowed(self):
        pass


def ids(told):
    return [int(text.split()[1]) for text in told if text.startswith("id: ")]


@pytest.fixture(params=["sqlite", "redis"])
def told(request, new_store):
    return Told(new_store(request.param))


async def test_changes_that_come_close_together_are_told_once_each(told, stored_adapter):
    stream = told.stream()
    assert (await anext(stream)).startswith(":")
    told.store.push("a", stored_adapter(1))
    told.store.push("a", stored_adapter(2))
    told.store.push("b", stored_adapter(3))
    found = []
    for revision in (1, 3):  # the other two are made before the first is read
        await told.feed.publish(revision)
        while len(found) < revision:
            found.append(await anext(stream))
    await stream.aclose()
    assert ids(found) == [1, 2, 3]


async def test_who_was_away_is_told_everything_page_by_page(told, stored_adapter, monkeypatch):
    monkeypatch.setattr(log, "_PAGE", 3)
    for seed in (1, 2):
        told.store.push("a", stored_adapter(seed))
        told.store.change("a", Move(seed, Event.PROBE_OK))
    for number in range(20):
        told.store.change("a", Move(1 + number % 2, Event.PROMOTE))
    revision = told.store.revision()
    await told.feed.publish(revision)
    found = [text async for text in told.stream(seconds=0)]
    assert ids(found) == list(range(1, revision + 1))
    assert set(told.pages[:-1]) == {3}


async def test_a_store_that_is_away_is_asked_now_and_then(told, stored_adapter, monkeypatch):
    told.store.push("a", stored_adapter(1))
    await told.feed.publish(1)
    told.away = 3
    waited = []

    async def changed(after, seconds):
        waited.append(seconds)
        return False

    monkeypatch.setattr(told.feed, "changed", changed)
    stream = told.stream()
    found = [await anext(stream) for _ in range(5)]
    await stream.aclose()
    assert found[1:4] == [": the store is away\n\n"] * 3
    assert (ids(found), waited) == ([1], [log._AWAY_S] * 3)


def test_a_stream_has_a_place_also_while_nobody_reads_it(data_dir, serving, adapter):
    few = RegistrySettings(port=0, data_dir=data_dir, max_waiters_per_client=2, log_level="warning")
    with serving(few) as registry:
        registry.push(adapter(1))
        with httpx.stream("GET", f"{registry.url}{STREAM}?after=0", timeout=30):
            with httpx.stream("GET", f"{registry.url}{STREAM}?after=0", timeout=30):
                refused = registry.http.get(STREAM, params={"after": 0, "wait": 0})
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "too_many_waiters"
            while registry.http.get(STREAM, params={"after": 0, "wait": 0}).status_code == 503:
                pass  # until it is noticed that the other has gone
        while "prad_registry_waiters 0.0" not in registry.http.get("/metrics").text:
            pass


@pytest.fixture
def guarded(data_dir, serving):
    """A registry that asks for tokens, the headers of its operator, and those of a reader."""
    secret, admin = data_dir.with_name("replicas"), data_dir.with_name("admin")
    asking = RegistrySettings(
        port=0, data_dir=data_dir, replica_secret_file=secret, admin_token_file=admin, log_level="warning"
    )
    with serving(asking) as registry:
        operator = {"authorization": f"Bearer {admin.read_text(encoding='utf-8').strip()}"}
        made = registry.http.post("/v1/keys", json={"name": "reader", "role": "read"}, headers=operator)
        yield registry, operator, {"authorization": f"Bearer {made.json()['token']}"}


def test_a_token_that_is_revoked_is_told_no_more(guarded, adapter):
    registry, operator, reader = guarded
    push = {"json": {"path": str(adapter(1))}, "headers": operator}
    with registry.http.stream("GET", STREAM, headers=reader) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith(":")
        assert httpx.post(f"{registry.url}/v1/tasks/seen/versions", **push).status_code == 201
        found = list(islice((line for line in lines if line.startswith("data")), 1))
        assert json.loads(found[0].removeprefix("data: "))["task"] == "seen"
        httpx.delete(f"{registry.url}/v1/keys/reader", headers=operator)
        httpx.post(f"{registry.url}/v1/tasks/unseen/versions", **push)
        assert [line for line in lines if line.startswith("data")] == [], "it has ended"


def test_a_token_that_is_revoked_while_it_waits_for_changes_is_told_none(guarded):
    registry, operator, reader = guarded
    revision = httpx.get(f"{registry.url}/v1/state", headers=operator).json()["revision"]
    answers = []

    def wait():
        asked = {"after": revision, "wait": 20}
        answers.append(httpx.get(f"{registry.url}/v1/changes", params=asked, headers=reader, timeout=30))

    waiting = threading.Thread(target=wait)
    waiting.start()
    while "prad_registry_waiters 1.0" not in httpx.get(f"{registry.url}/metrics", headers=operator).text:
        pass
    httpx.delete(f"{registry.url}/v1/keys/reader", headers=operator)
    waiting.join()
    assert answers[0].status_code == 401
