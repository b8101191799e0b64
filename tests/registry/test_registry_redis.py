"""Registries on a real Redis: several at once, killed, without their Redis for a while, warned."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
from redis import Redis
from redis.client import Pipeline

from adapter_registry import redis_store
from adapter_registry.client import RegistryClient
from adapter_registry.errors import (
    CannotStartError,
    RegistryError,
    RoutingChangedError,
    StoreUnavailableError,
)
from adapter_registry.redis_changes import RedisChanges
from adapter_registry.redis_server import REGISTRY, SCHEMA
from adapter_registry.redis_store import RedisStore
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
from prad.artefact import files_digest
from tests.redis_process import RedisProcess

pytestmark = pytest.mark.filterwarnings("ignore:The .* attribute with value:UserWarning")
"""FastAPI hides it while it builds a field, which the threads of two servers undo for each other."""

PROGRAM = """
from adapter_registry.server import RegistryServer
from adapter_registry.settings import RegistrySettings
server = RegistryServer(RegistrySettings(port=0, log_level="warning"))
print(server.url, flush=True)
server.run()
"""


def settings(data_dir, redis, **more):
    return RegistrySettings(port=0, data_dir=data_dir, redis_url=redis.url, log_level="warning", **more)


@pytest.fixture
def own_redis(tmp_path_factory):
    """A Redis to be killed."""
    running = RedisProcess(tmp_path_factory.mktemp("r"))
    yield running
    running.kill()


@contextmanager
def process(data_dir, redis):
    """A registry in a process of its own, and its URL."""
    given = {"PRAD_REGISTRY_DATA_DIR": str(data_dir), "PRAD_REGISTRY_REDIS_URL": redis.url}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **given},
    ) as running:
        try:
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


def push(url, folder, task="support"):
    response = httpx.post(f"{url}/v1/tasks/{task}/versions", json={"path": str(folder)}, timeout=30)
    return response.json()


def until(said):
    end = time.monotonic() + 60
    while not said():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_registries_agree(data_dir, redis, adapter):
    with process(data_dir, redis) as (_, one), process(data_dir, redis) as (_, two), ExitStack() as opened:
        first, second = (opened.enter_context(RegistryClient(url)) for url in (one, two))
        heard = []
        waiter = threading.Thread(target=lambda: heard.append(second.changes(0, 30)))
        waiter.start()
        until(lambda: "prad_registry_waiters 1.0" in httpx.get(f"{two}/metrics").text)
        pushed = push(one, adapter(1))
        waiter.join()
        assert heard[0].tasks[0].versions[0].digest == pushed["digest"]
        httpx.post(f"{two}/v1/tasks/support/versions/1/probe", json={"ok": True, "replica": "p"})
        assert first.task("support") == second.task("support")
        got = httpx.get(f"{two}/v1/tasks/support/versions/1/files/prad.json")
        assert got.content == (adapter(1) / "prad.json").read_bytes(), "they share the folder of files"


def test_pushes_to_two_registries_get_numbers_of_their_own(data_dir, redis, adapter):
    folders = [adapter(seed) for seed in range(12)]
    with process(data_dir, redis) as (_, one), process(data_dir, redis) as (_, two):
        with ThreadPoolExecutor(6) as pool:
            turns = [(url, folder) for folder in folders for url in (one, two)]
            pushed = list(pool.map(lambda turn: push(*turn), turns))
        assert sorted({(p["version"], p["digest"]) for p in pushed}) == sorted(
            (p["version"], p["digest"]) for p in pushed if p["created"]
        )
        assert sorted(p["version"] for p in pushed if p["created"]) == list(range(1, 13))


def test_an_operators_race_has_one_winner(data_dir, redis, adapter, serving):
    with serving(settings(data_dir, redis)) as one, serving(settings(data_dir, redis)) as two:
        for seed in (1, 2, 3):
            one.verified(adapter(seed))
        seen = two.client.task("support").routing.revision
        outcomes = []

        def promote(registry, version):
            try:
                outcomes.append(registry.client.promote("support", version, seen=seen))
            except RoutingChangedError as error:
                outcomes.append(error)

        racers = [threading.Thread(target=promote, args=turn) for turn in ((one, 2), (two, 3))]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        (won,) = [each for each in outcomes if not isinstance(each, RegistryError)]
        (lost,) = [each for each in outcomes if isinstance(each, RegistryError)]
        assert f"not {seen}: somebody changed it meanwhile" in lost.message
        assert two.client.task("support").routing == one.client.task("support").routing == won.routing


def test_a_start_removes_only_what_the_dead_left(data_dir, redis, adapter, serving):
    with serving(settings(data_dir, redis)) as one:
        digest = one.push(adapter(1)).digest
        (folder,) = (data_dir / "redis").iterdir()
        (uploader,) = {path.name for path in (folder / "processes").iterdir()} - {"lock"}
        living, dead = folder / "staging" / f"{uploader}-x", folder / "staging" / "gone-x"
        orphan = folder / "artefacts" / ("0" * 64)
        for each in (living, dead, orphan):
            each.mkdir()
        with serving(settings(data_dir, redis)):
            assert (living.exists(), dead.exists(), orphan.exists()) == (True, False, False)
            assert (folder / "artefacts" / digest).is_dir()


def test_without_redis_it_says_so_and_goes_on_when_it_is_back(data_dir, own_redis, adapter, serving):
    with serving(settings(data_dir, own_redis)) as registry:
        registry.verified(adapter(1))
        revision = registry.client.state().revision
        assert "prad_registry_store_up 1.0" in registry.http.get("/metrics").text
        own_redis.kill()
        for method, path in (("GET", "/ready"), ("GET", "/v1/state")):
            response = registry.http.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
        assert f"Redis at {own_redis.url.removeprefix('unix://')}" in response.json()["error"]["message"]
        with pytest.raises(StoreUnavailableError, match="may have been made"):
            registry.push(adapter(2))
        page = registry.http.get("/metrics").text
        assert "prad_registry_store_up 0.0" in page
        assert 'prad_registry_versions{state="routable"} 1.0' in page, "as it was last"
        assert registry.client.changes(revision, 0.1) is None, "who follows goes on with what it knows"
        assert registry.http.get("/health").status_code == 200

        own_redis.start()
        until(lambda: registry.http.get("/ready").status_code == 200)
        assert "prad_registry_store_up 1.0" in registry.http.get("/metrics").text
        assert registry.client.state().revision == revision
        assert registry.push(adapter(2)).name == "support@2"


def test_a_redis_that_lost_its_data_is_not_taken_for_an_empty_registry(data_dir, redis, adapter, serving):
    with serving(settings(data_dir, redis)) as registry:
        registry.verified(adapter(1))
        redis.empty()
        with pytest.raises(StoreUnavailableError, match="no longer has the registry's data"):
            registry.client.state()
        with pytest.raises(StoreUnavailableError):
            registry.push(adapter(2))
    with serving(settings(data_dir, redis)) as registry:
        assert registry.client.state().revision == 0
    assert len(list((data_dir / "redis").iterdir())) == 2, "the files of the lost one are kept"


def test_nothing_acknowledged_is_lost_by_kills(data_dir, own_redis, adapter):
    rng = random.Random(5)
    folders = [adapter(seed) for seed in range(200)]
    acknowledged, promoted, ended = {}, {}, threading.Event()

    def keep_changing(url):
        with suppress(httpx.TransportError, KeyError), httpx.Client(base_url=url, timeout=30) as http:
            while not ended.is_set():
                folder = folders[len(acknowledged) % len(folders)]
                pushed = http.post("/v1/tasks/support/versions", json={"path": str(folder)}).json()
                acknowledged[pushed["version"]] = pushed["digest"]
                at = f"/v1/tasks/support/versions/{pushed['version']}"
                http.post(f"{at}/probe", json={"ok": True})
                routed = http.post(f"{at}/promote").json()
                promoted[routed["routing"]["revision"]] = pushed["version"]

    def change_and_kill(redis_is_killed):
        with process(data_dir, own_redis) as (running, url):
            enough = len(promoted) + 2
            changing = threading.Thread(target=keep_changing, args=(url,))
            changing.start()
            until(lambda: len(promoted) >= enough or not changing.is_alive())
            time.sleep(rng.uniform(0, 0.05))
            if redis_is_killed:
                own_redis.kill()
                own_redis.start()
            else:
                running.send_signal(signal.SIGKILL)
            ended.set()
            changing.join()
            ended.clear()

    for turn in range(6):
        change_and_kill(redis_is_killed=turn % 2 == 1)
    with process(data_dir, own_redis) as (_, url), RegistryClient(url) as client:
        task = client.task("support")
        stored = {version.version: version.digest for version in task.versions}
        assert len(promoted) >= 12
        assert acknowledged.items() <= stored.items()
        assert task.routing.revision >= max(promoted)
        for revision, version in promoted.items():
            lines = client.version("support", version).history
            assert (revision, "promote") in [(line.revision, line.event) for line in lines]
        (folder,) = (data_dir / "redis").iterdir()
        for digest in stored.values():
            assert files_digest(folder / "artefacts" / digest) == digest


def test_it_tells_of_versions_that_stayed_behind(data_dir, redis, adapter, serving, caplog):
    with serving(RegistrySettings(port=0, data_dir=data_dir, log_level="warning")) as registry:
        registry.push(adapter(1))
    with serving(settings(data_dir, redis)) as registry:
        registry.push(adapter(2))
    assert "registry.sqlite3 are not in this Redis" in caplog.text
    caplog.clear()
    with serving(settings(data_dir, redis)):
        pass
    assert "are not in this Redis" not in caplog.text


def test_it_warns_of_a_redis_that_forgets(data_dir, tmp_path_factory, serving):
    forgetful = RedisProcess(tmp_path_factory.mktemp("r"), "--appendonly", "no")
    try:
        with serving(settings(data_dir, forgetful)) as registry:
            (warning,) = registry.http.get("/ready").json()["warnings"]
            assert "WILL BE LOST" in warning
            assert "prad_registry_store_warnings 1.0" in registry.http.get("/metrics").text
        with Redis.from_url(forgetful.url) as client:
            client.config_set("appendonly", "yes")
            client.config_set("maxmemory-policy", "allkeys-lru")
        store = RedisStore(forgetful.url)
        assert [text.split(":")[0].split("(")[-1] for text in store.warnings()] == [
            "appendfsync everysec)",
            "maxmemory-policy allkeys-lru)",
        ]
        store.close()
    finally:
        forgetful.kill()


def test_an_acl_user_needs_no_more_than_its_keys(tmp_path_factory, data_dir, adapter, serving):
    guarded = RedisProcess(
        tmp_path_factory.mktemp("r"),
        *("--appendonly", "yes", "--appendfsync", "always", "--requirepass", "of-the-default-user"),
        *("--user", "prad", "on", ">se/cret", "~{prad}:*", "+@all", "-@dangerous", "-@admin"),
    )
    try:
        socket = guarded.url.removeprefix("unix://")
        with pytest.raises(CannotStartError, match=rf"Redis at {socket} cannot be used: .* or asks for one"):
            RegistryServer(settings(data_dir, guarded))
        guarded.url = f"unix://prad:wrong@{socket}"
        with pytest.raises(CannotStartError, match="cannot be used") as refused:
            RegistryServer(settings(data_dir, guarded))
        assert "wrong@" not in str(refused.value)
        guarded.url = f"unix://prad:se%2Fcret@{socket}"
        with serving(settings(data_dir, guarded)) as registry:
            registry.verified(adapter(1))
            (warning,) = registry.http.get("/ready").json()["warnings"]
            assert "is not known, CONFIG GET is refused" in warning
            assert "se/cret" not in registry.http.get("/ready").text
    finally:
        guarded.kill()


@pytest.mark.parametrize("url", ["http://127.0.0.1:6379", "127.0.0.1:6379", "redis://127.0.0.1:none"])
def test_a_url_that_is_none_is_refused(data_dir, url):
    with pytest.raises(CannotStartError, match="redis_url cannot be read"):
        RegistryServer(RegistrySettings(port=0, data_dir=data_dir, redis_url=url))


def test_a_newer_schema_is_refused_and_the_way_out_named(data_dir, redis):
    with Redis.from_url(redis.url) as client:
        client.hset(REGISTRY, mapping={"schema": SCHEMA + 1, "id": "x", "revision": 7})
    with pytest.raises(CannotStartError, match=r"has schema 4, this program knows 3 .*registry export FILE"):
        RegistryServer(settings(data_dir, redis))


def test_a_history_is_read_while_other_tasks_change(redis, stored_adapter, monkeypatch):
    store = RedisStore(redis.url)
    store.push("a", stored_adapter(1))
    execute, times = Pipeline.execute, []

    def execute_and_be_passed(pipe, *arguments):
        found = execute(pipe, *arguments)
        times.append(1)
        assert len(times) < 50, "it starts over without end"
        with Redis.from_url(redis.url) as other:
            other.hincrby("{prad}:registry", "revision")
        return found

    monkeypatch.setattr(Pipeline, "execute", execute_and_be_passed)
    assert [line.event for line in store.history("a")] == ["push"]
    store.close()


def test_a_history_that_gets_versions_faster_than_it_is_read_is_refused(redis, stored_adapter, monkeypatch):
    store, other = RedisStore(redis.url), RedisStore(redis.url)
    store.push("a", stored_adapter(1))
    read, seeds = redis_store.read, iter(range(2, 40))

    def read_and_be_passed(text):
        with monkeypatch.context() as plain:
            plain.setattr(redis_store, "read", read)
            other.push("a", stored_adapter(next(seeds)))
        return read(text)

    monkeypatch.setattr(redis_store, "read", read_and_be_passed)
    with pytest.raises(StoreUnavailableError, match="'a' gets versions faster"):
        store.history("a")
    monkeypatch.undo()
    assert {line.version for line in store.history("a")} == set(range(1, 12))
    for each in (store, other):
        each.close()


def test_a_connection_lost_while_it_watches_is_an_unavailable_store(
    data_dir, redis, adapter, serving, monkeypatch
):
    """Not a race, in which it would try again: whether the change was made is not known."""
    with serving(settings(data_dir, redis)) as running:
        read = redis_store.read

        def read_and_be_cut_off(*arguments):
            found = read(*arguments)
            monkeypatch.setattr(redis_store, "read", read)
            with Redis.from_url(redis.url) as other:
                other.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            return found

        monkeypatch.setattr(redis_store, "read", read_and_be_cut_off)
        refused = running.http.post("/v1/tasks/support/versions", json={"path": str(adapter(1))})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert push(running.url, adapter(1))["version"] == 1


def test_who_misses_that_it_is_to_stop_is_told_again(data_dir, redis, serving, monkeypatch):
    """A library that takes a cancellation for its own time-out would keep the registry from ending."""

    async def follow(self):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    monkeypatch.setattr(RedisChanges, "follow", follow)
    with serving(settings(data_dir, redis)) as registry:
        assert registry.http.get("/ready").status_code == 200
