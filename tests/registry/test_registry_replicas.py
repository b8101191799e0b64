"""Promote and retire answer when connected replicas route by the change, or say which do not yet."""

import threading

import httpx
import pytest

from adapter_registry.client import AsyncRegistryClient, RegistryClient
from adapter_registry.client_calls import UNTOLD
from adapter_registry.errors import CannotStartError, NotAReplicaError, TooManyWaitersError
from adapter_registry.probing import NotProbedError, wait_probed
from adapter_registry.secret import ensure_secret, read_secret
from adapter_registry.server import run
from adapter_registry.settings import RegistrySettings
from adapter_registry.versions import State


def settings(data_dir, **more):
    return RegistrySettings(port=0, data_dir=data_dir, log_level="warning", **more)


class Following:
    """A replica that asks for changes as one does, and puts each in force only once it may."""

    def __init__(self, registry, name):
        self.name = name
        self.may = threading.Event()
        self.may.set()
        self.ended = threading.Event()
        self._http = httpx.Client(base_url=registry.url, timeout=30)
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.may.set()
        self._thread.join()
        self._http.close()

    def _run(self):
        known = self._http.get("/v1/state").json()["revision"]
        while not self.ended.is_set():
            asked = {"after": known, "wait": 0.1, "replica": self.name}
            response = self._http.get("/v1/changes", params=asked)
            if response.status_code == 200:
                self.may.wait()
                known = response.json()["revision"]


def until_connected(registry, count):
    while sum(replica.connected for replica in registry.client.replicas().replicas) < count:
        pass


def test_nobody_connected_is_not_waited_for(data_dir, serving, adapter):
    with serving(settings(data_dir, replicas_wait_seconds=60)) as registry:
        registry.verified(adapter(1))  # somebody reported a probe, but follows nothing
        rerouted = registry.client.promote("support", 1)
        assert (rerouted.replicas, rerouted.pending) == ({}, ())


def test_promote_and_retire_wait_for_all_connected_replicas(data_dir, serving, adapter):
    with serving(settings(data_dir, replicas_wait_seconds=60)) as registry:
        registry.verified(adapter(1))
        registry.verified(adapter(2))
        with Following(registry, "a"), Following(registry, "b"):
            until_connected(registry, 2)
            for change in (
                lambda: registry.client.promote("support", 2),
                lambda: registry.client.retire("support", 1),
            ):
                rerouted = change()
                revision = rerouted.routing.revision
                assert rerouted.pending == ()
                assert rerouted.replicas == {"a": revision, "b": revision}


def test_who_has_not_put_it_in_force_is_named(data_dir, serving, adapter):
    with serving(settings(data_dir, replicas_wait_seconds=0.3)) as registry:
        registry.verified(adapter(1))
        registry.verified(adapter(2))
        with Following(registry, "a"), Following(registry, "slow") as slow:
            until_connected(registry, 2)
            slow.may.clear()
            before = registry.client.state().revision
            rerouted = registry.client.promote("support", 2)
            assert rerouted.routing.default == 2
            assert (rerouted.pending, rerouted.replicas["slow"]) == (("slow",), before)
            assert registry.client.replicas(before + 1).pending == ("slow",)
            slow.may.set()
            followers = registry.client.replicas(before + 1, 20)
            assert followers.pending == ()
            assert {
                r.name: r.revision for r in followers.replicas if r.name != "prefill-1"
            } == rerouted.replicas | {"slow": before + 1}


def test_a_replica_that_hangs_up_is_not_waited_for(data_dir, serving, adapter):
    with serving(settings(data_dir, replicas_wait_seconds=60)) as registry:
        registry.verified(adapter(1))
        revision = registry.client.state().revision
        asked = {"after": revision, "wait": 30, "replica": "gone"}
        with pytest.raises(httpx.ReadTimeout):
            registry.http.get("/v1/changes", params=asked, timeout=0.3)
        while any(r.connected for r in registry.client.replicas().replicas if r.name == "gone"):
            pass
        assert "prad_registry_waiters 0.0" in registry.http.get("/metrics").text
        assert registry.client.retire("support", 1).pending == ()


def test_a_replica_of_a_registry_whose_data_are_gone_is_behind(registry, adapter):
    registry.push(adapter(1))
    registry.http.get("/v1/changes", params={"after": 57, "replica": "old"})
    assert registry.client.replicas(1).pending == ("old",)


async def test_only_a_replica_with_the_secret_is_believed(data_dir, serving, adapter, tmp_path):
    file = tmp_path / "secret"
    with serving(settings(data_dir, replica_secret_file=file)) as registry:
        assert (file.stat().st_mode & 0o777, len(read_secret(file))) == (0o600, 64)
        registry.push(adapter(1))
        for headers in ({}, {"authorization": "Bearer guess"}, {"authorization": "Bearer \u00e9".encode()}):
            probe = {"ok": True, "replica": "prefill-1"}
            response = registry.http.post("/v1/tasks/support/versions/1/probe", json=probe, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "not_a_replica")
            asked = {"after": 0, "replica": "prefill-1"}
            assert registry.http.get("/v1/changes", params=asked, headers=headers).status_code == 403
        assert registry.client.version("support", 1).state == "pushed"
        assert registry.client.replicas().replicas == ()
        assert registry.client.changes(0).revision == 1, "looking on is everybody's"
        for secret, believed in (("wrong", False), (ensure_secret(file), True)):
            async with AsyncRegistryClient(
                registry.url, cache_dir=tmp_path, replica="prefill-1", secret=secret
            ) as prefill:
                if believed:
                    assert (await prefill.probe("support", 1, ok=True)).current
                    assert (await prefill.changes(0)).revision == 3
                else:
                    with pytest.raises(NotAReplicaError, match="registry_secret_file"):
                        await prefill.probe("support", 1, ok=True)


def test_beyond_loopback_there_must_be_a_secret(data_dir, tmp_path):
    with pytest.raises(CannotStartError, match="set replica_secret_file"):
        run(settings(data_dir, host="0.0.0.0"))
    short = tmp_path / "short"
    short.write_text("hunter2\n", encoding="utf-8")
    with pytest.raises(CannotStartError, match="at least 16 ASCII characters"):
        run(settings(data_dir, replica_secret_file=short))
    with pytest.raises(CannotStartError, match="cannot read"):
        read_secret(tmp_path / "none")


def test_strangers_take_no_replicas_place(data_dir, serving):
    with serving(settings(data_dir, max_waiters=2, max_waiters_per_client=3)) as registry:
        with Following(registry, "known"):
            until_connected(registry, 1)
        threads = [threading.Thread(target=_wait, args=(registry.url,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        while "prad_registry_waiters 2.0" not in registry.http.get("/metrics").text:
            pass
        with pytest.raises(TooManyWaitersError, match="try again later"):
            registry.client.changes(0, 30)
        asked = {"after": 0, "wait": 0.05, "replica": "known"}
        assert registry.http.get("/v1/changes", params=asked).status_code == 204, "it keeps its place"
        asked["replica"] = "unknown"
        assert registry.http.get("/v1/changes", params=asked).status_code == 503
    for thread in threads:
        thread.join()


def test_one_address_has_only_so_many_places(data_dir, serving):
    with serving(settings(data_dir, max_waiters_per_client=1)) as registry:
        with Following(registry, "known"):
            until_connected(registry, 1)
        thread = threading.Thread(target=_wait, args=(registry.url,))
        thread.start()
        while "prad_registry_waiters 1.0" not in registry.http.get("/metrics").text:
            pass
        with pytest.raises(TooManyWaitersError, match=r"from 127\.0\.0\.1 already wait"):
            registry.client.changes(0, 30)
        asked = {"after": 0, "wait": 0.05, "replica": "known"}
        assert registry.http.get("/v1/changes", params=asked).status_code == 204, "its place is its own"
    thread.join()


def _wait(url):
    with RegistryClient(url) as client:
        assert client.changes(0, 30) is None  # sent home as the registry ends


def test_who_warms_hears_that_a_replica_could_not_tell_of_all(registry, adapter):
    registry.verified(adapter(1))
    asked = {"after": 0, "wait": 0, "replica": "cut", "trouble": [f"{UNTOLD}3 more"]}
    assert registry.http.get("/v1/changes", params=asked).status_code == 200
    asked |= {"replica": "whole", "trouble": ["support@9: cold"]}
    assert registry.http.get("/v1/changes", params=asked).status_code == 200
    warmed = registry.client.warm("support", 1)
    assert (warmed.ready, warmed.failed, warmed.pending) == ((), {"cut": "3 more"}, ("whole",))


def test_who_waits_for_a_probe_hears_why_nobody_can_make_it(registry, adapter):
    name = registry.push(adapter(1)).name

    def follow(replica, *troubles):
        asked = {"after": 0, "wait": 0, "replica": replica, "in_force": 0, "trouble": troubles}
        assert registry.http.get("/v1/changes", params=asked).status_code == 200

    def waited(seconds):
        return wait_probed(registry.client, "support", 1, connect_seconds=0, probe_seconds=seconds)

    follow("old", f"{name}: trained on other weights", "other@1: damaged")
    with pytest.raises(NotProbedError, match="no connected prefill service can verify it: old: trained on"):
        waited(60)
    follow("new")
    with pytest.raises(NotProbedError, match="no prefill service has reported on it for 0 s"):
        waited(0)
    registry.probe(name)
    assert waited(60).state is State.ROUTABLE
