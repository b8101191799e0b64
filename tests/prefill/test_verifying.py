"""Pushed versions are verified beside the following: nothing else waits for that, and nothing stops it."""

import asyncio
from typing import Any

import pytest

from adapter_registry.client_calls import Progress
from adapter_registry.errors import RegistryUnreachableError, StoreUnavailableError
from adapter_registry.messages import RoutingState
from adapter_registry.versions import State
from prefill_service import follower, verifying
from prefill_service.catalogue import TaskCatalogue
from tests.prefill.following import digest, routed
from tests.prefill.live_registry import LiveRegistry, following, until

HERE, PUSHED = State.ROUTABLE, State.PUSHED


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_RETRY_S", "_TELL_S", "_FETCH_S", "AGAIN_S"):
        monkeypatch.setattr(follower, name, 0.01)
    monkeypatch.setattr(verifying, "AGAIN_S", 0.01)


class Gate:
    """A probe that ends when a test lets it."""

    def __init__(self) -> None:
        self.probed: list[str] = []
        self.cancelled = 0
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    async def __call__(self, artefact: Any) -> None:
        self.probed.append(artefact.digest)
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def warmed(told: RoutingState, number: int) -> RoutingState:
    """Somebody asked for the version with this state."""
    (task,) = told.tasks
    update = {"warmed": told.revision}
    its = tuple(v.model_copy(update=update if v.version == number else {}) for v in task.versions)
    return told.model_copy(update={"tasks": (task.model_copy(update={"versions": its}),)})


def plain(catalogue: TaskCatalogue) -> str:
    return catalogue.resolve("t", None)[0].digest


async def test_a_rollback_is_in_force_while_a_probe_runs() -> None:
    registry, probe = LiveRegistry(routed(1, {2: 100}, {"v1": HERE, "v2": HERE})), Gate()
    registry.let("t@1", "t@2", "t@3")
    async with following(registry, probe) as catalogue:
        await until(lambda: registry.progress == Progress(1, 0, []))
        registry.tell(routed(2, {2: 100}, {"v1": HERE, "v2": HERE, "v3": PUSHED}))
        await until(lambda: probe.probed)
        registry.tell(routed(3, {1: 100}, {"v1": HERE, "v2": HERE, "v3": PUSHED}))
        await until(lambda: registry.progress == Progress(3, 0, []))
        assert (plain(catalogue), registry.probes) == (digest(1), [])
        probe.open()
        await until(lambda: registry.probes == [("t@3", True, "")])
        registry.tell(routed(4, {1: 100}, {"v1": HERE, "v2": HERE, "v3": State.VERIFIED}))
        await until(lambda: registry.progress == Progress(4, 0, []))
    assert probe.probed == [digest(3)], "once, though it was told twice"


async def test_one_is_verified_at_a_time_and_each() -> None:
    registry, probe = LiveRegistry(routed(1, {}, {"v1": PUSHED, "v2": PUSHED})), Gate()
    registry.let("t@1", "t@2")
    async with following(registry, probe):
        await until(lambda: len(registry.asked) > 3)
        assert probe.probed == [digest(1)]
        probe.open()
        await until(lambda: len(registry.probes) == 2)
        count = len(registry.asked)
        await until(lambda: len(registry.asked) > count)
    assert registry.probes == [("t@1", True, ""), ("t@2", True, "")]


async def test_a_version_that_comes_back_is_probed_again() -> None:
    registry, probe = LiveRegistry(routed(1, {}, {"v1": PUSHED})), Gate()
    registry.let("t@1")
    probe.open()
    async with following(registry, probe):
        await until(lambda: registry.probes)
        registry.tell(routed(4, {}, {"v1": PUSHED}))  # verified, retired and brought back meanwhile
        await until(lambda: len(registry.probes) == 2)


@pytest.mark.parametrize(
    "away", [StoreUnavailableError("the bucket is away"), RegistryUnreachableError("no answer")]
)
async def test_files_that_are_away_stop_nothing_but_their_version(away: Exception) -> None:
    loaded = []

    async def load(artefact: Any) -> None:
        loaded.append(artefact.digest)

    registry, probe = LiveRegistry(routed(1, {1: 100}, {"v1": HERE})), Gate()
    registry.wrong["t@2"] = away
    registry.let("t@1", "t@2", "t@3")
    probe.open()
    async with following(registry, probe, load) as catalogue:
        await until(lambda: registry.progress == Progress(1, 0, []))
        registry.tell(routed(2, {1: 100}, {"v1": HERE, "v2": PUSHED}))
        await until(lambda: registry.progress == Progress(2, 0, [f"t@2: {away}"]))
        registry.tell(routed(3, {3: 100}, {"v1": HERE, "v2": PUSHED, "v3": HERE}))
        await until(lambda: registry.progress == Progress(3, 0, [f"t@2: {away}"]))
        assert plain(catalogue) == digest(3)
        registry.tell(warmed(routed(4, {3: 100}, {"v1": HERE, "v2": PUSHED, "v3": HERE}), 1))
        await until(lambda: loaded == [digest(1)])
        registry.wrong.clear()
        await until(lambda: registry.probes == [("t@2", True, "")])
        await until(lambda: registry.progress == Progress(4, 0, []))
        assert registry.wholes == 1, "it asks for changes alone"


async def test_one_that_starts_while_files_are_away_follows(caplog: pytest.LogCaptureFixture) -> None:
    registry = LiveRegistry(routed(3, {1: 100}, {"v1": HERE, "v2": PUSHED}))
    registry.wrong["t@2"] = StoreUnavailableError("the bucket is away")
    registry.let("t@1", "t@2")
    async with following(registry) as catalogue:
        await until(lambda: registry.progress == Progress(3, 0, ["t@2: the bucket is away"]))
        assert (plain(catalogue), registry.wholes) == (digest(1), 1)
        await until(lambda: registry.fetched.count("t@2") > 5)
    said = [text for text in caplog.messages if "t@2" in text]
    assert said == ["t@2 cannot be verified: the bucket is away"], "it is tried again and again"


async def test_a_report_that_does_not_arrive_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, report = LiveRegistry(routed(1, {}, {"v1": PUSHED})), LiveRegistry.probe
    registry.let("t@1")
    away = [StoreUnavailableError("Redis is away"), RegistryUnreachableError("no answer")]

    async def probe(self: LiveRegistry, *told: Any, **more: Any) -> None:
        if away:
            raise away.pop(0)
        await report(self, *told, **more)

    monkeypatch.setattr(LiveRegistry, "probe", probe)
    async with following(registry):
        await until(lambda: registry.probes == [("t@1", True, "")])
        await until(lambda: registry.progress == Progress(1, 0, []))


async def test_what_is_not_pushed_any_more_is_no_trouble() -> None:
    registry = LiveRegistry(routed(1, {}, {"v1": PUSHED}))
    registry.wrong["t@1"] = ValueError("odd")
    registry.let("t@1")
    async with following(registry):
        await until(lambda: registry.progress.troubles == ["t@1: odd"])
        registry.tell(routed(2, {}, {"v1": State.RETIRED}))
        await until(lambda: registry.progress == Progress(2, 0, []))


async def test_a_probe_ends_with_the_following() -> None:
    registry, probe = LiveRegistry(routed(1, {}, {"v1": PUSHED})), Gate()
    registry.let("t@1")
    async with following(registry, probe):
        await until(lambda: probe.probed)
    assert (probe.cancelled, registry.probes) == (1, [])
