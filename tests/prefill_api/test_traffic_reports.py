"""What was answered is noted by version, taken, and told to the registry; nothing waits for that."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from adapter_registry.errors import RegistryUnreachableError
from adapter_registry.messages import MOST_SERIES, ShadowTraffic, VersionTraffic
from adapter_registry.routing import Routing
from prad.lm import LanguageModel, Tokenizer
from prefill_service.api import ModelInfo, Traffic, create_app, report_traffic
from prefill_service.api.outcomes import Tally
from prefill_service.catalogue import TaskCatalogue, TaskVersions
from prefill_service.errors import OverloadedError
from tests.prefill_api.conftest import ScriptedEngine


class Full(ScriptedEngine):
    """Has no room."""

    def generate(self, request: Any) -> Any:
        raise OverloadedError("no room")


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture
def serving(
    tokenizer: Tokenizer, language_model: LanguageModel, catalogue: TaskCatalogue, traffic: Traffic
) -> Callable[[Any], Any]:
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())

    @asynccontextmanager
    async def serve(engine: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(engine, catalogue, tokenizer, info, traffic=traffic)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            yield client

    return serve


def found(traffic: Traffic) -> dict[tuple[str, int], VersionTraffic]:
    versions, _ = traffic.take()
    return {(each.task, each.version): each for each in versions}


async def test_what_ended_is_noted_by_version(
    serving: Callable[[Any], Any], scripted: Callable[[str], ScriptedEngine], traffic: Traffic
) -> None:
    async with serving(scripted("yes it is")) as client:
        for name in ("e2e@1", "e2e@1", "plain"):
            await client.post("/v1/completions", json={"model": name, "prompt": "a"})
        await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        await client.post("/v1/completions", json={"model": "nobody", "prompt": "a"})
        await client.post("/v1/completions", json={"model": "e2e", "prompt": 7})
        await client.get("/metrics")
    told = found(traffic)
    assert {name: each.requests for name, each in told.items()} == {
        ("e2e", 1): 2,
        ("plain", 2): 1,
        ("", 0): 1,
    }
    assert told["", 0].tokens == 2
    e2e = told["e2e", 1]
    assert (e2e.failed, sum(e2e.first_token), sum(e2e.duration)) == (0, 2, 2)
    assert found(traffic) == {}


async def test_who_is_refused_counts_as_failed(serving: Callable[[Any], Any], traffic: Traffic) -> None:
    async with serving(Full()) as client:
        answer = await client.post("/v1/completions", json={"model": "e2e", "prompt": "a"})
        assert answer.status_code >= 429
    told = found(traffic)["e2e", 2]
    assert (told.requests, told.failed, sum(told.first_token)) == (1, 1, 0)


async def test_shadows_are_noted_by_pair(
    serving: Callable[[Any], Any],
    scripted: Callable[[str], ScriptedEngine],
    catalogue: TaskCatalogue,
    traffic: Traffic,
) -> None:
    before = {each.name: each.routed for each in catalogue.tasks()}
    routing = Routing(revision=42, split={1: 100}, shadow={2: 100.0})
    catalogue.replace({name: TaskVersions.of(routing, routed.versions) for name, routed in before.items()})
    try:
        async with serving(scripted("yes it is")) as client:
            await client.post("/v1/completions", json={"model": "plain", "prompt": "a", "temperature": 0})
            while not traffic.shadows or not next(iter(traffic.shadows.values())).compared:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        catalogue.replace(before)
    (told,) = traffic.take()[1]
    assert (told.task, told.version, told.shadow) == ("plain", 1, 2)
    assert (told.compared, told.equal, told.dropped) == (1, 1, 0)
    assert told.equal_tokens == told.tokens > 0
    assert (sum(told.live_first), sum(told.shadow_first)) == (1, 1)


class _Registry:
    """Hears reports, but for the first."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []

    async def traffic(
        self, versions: list[VersionTraffic], shadows: list[ShadowTraffic] | None = None
    ) -> None:
        self.heard.append((len(versions), len(shadows or ())))
        if len(self.heard) == 1:
            raise RegistryUnreachableError("away")


async def test_reports_are_bounded_and_one_that_is_lost_ends_nothing(traffic: Traffic) -> None:
    registry = _Registry()
    traffic.versions["a", 1] = Tally(requests=1)
    reporting = asyncio.create_task(report_traffic(registry, traffic, 0.01))  # type: ignore[arg-type]
    try:
        while not registry.heard:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        for number in range(MOST_SERIES + 2):
            traffic.versions[f"t{number}", 1] = Tally(requests=1)
        while sum(count for count, _ in registry.heard) < MOST_SERIES + 3:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert registry.heard == [(1, 0), (MOST_SERIES, 0), (2, 0)]
        assert not reporting.done()
    finally:
        reporting.cancel()
