"""Requests for a version whose adapter is on its way: they wait for it, and are answered."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from prefill_service.catalogue import TaskCatalogue, TaskVersions
from prefill_service.errors import NotReadyError
from tests.prefill_api.conftest import ROUTING

BODY = {"model": "coming", "prompt": "the food", "max_tokens": 3, "ignore_eos": True}
URL = "/v1/completions"


@dataclass
class Coming:
    """Is here when `arrive` is called, or is not to be had."""

    catalogue: TaskCatalogue
    number: int = 2
    digest: str = "f" * 64
    method: str = "pa"
    waiting: int = 0
    trouble: str = ""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def here(self) -> None:
        self.waiting += 1
        try:
            await self.ended.wait()
        finally:
            self.waiting -= 1
        if self.trouble:
            raise NotReadyError(f"coming@2 is not here: {self.trouble}", retry_after=5.0)

    def arrive(self) -> None:
        (found,) = (task.routed for task in self.catalogue.tasks() if task.name == "e2e")
        self.catalogue.update("coming", TaskVersions.of(ROUTING, found.versions))
        self.ended.set()


@pytest.fixture
async def coming(catalogue: TaskCatalogue) -> AsyncIterator[Coming]:
    made = Coming(catalogue)
    catalogue.update("coming", TaskVersions.of(ROUTING, {}, coming={2: made}))
    yield made
    catalogue.update("coming", None)


async def until(so: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_it_is_listed_and_named_as_on_its_way(client: httpx.AsyncClient, coming: Coming) -> None:
    assert (await client.get("/ready")).json() == {"status": "ready", "reasons": [], "fetching": 1}
    listed = {each["id"]: each for each in (await client.get("/v1/models")).json()["data"]}
    prad = listed["coming"]["prad"]
    assert (listed["coming"]["root"], listed["coming"]["max_model_len"]) == (coming.digest, None)
    assert (prad["versions"], prad["split"], prad["method"]) == ([2], {"2": 100}, "pa")
    assert prad["generation"] is None
    assert "prad_adapters_fetching 1.0" in (await client.get("/metrics")).text
    asked = asyncio.create_task(client.get("/v1/models/coming"))
    await until(lambda: coming.waiting)
    coming.arrive()
    assert (await asked).json()["prad"]["generation"]["max_tokens"] == 7
    assert (await client.get("/ready")).json()["fetching"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_wait_until_it_is_here(
    client: httpx.AsyncClient, coming: Coming, stream: bool
) -> None:
    asked = [asyncio.create_task(client.post(URL, json=BODY | {"stream": stream})) for _ in range(3)]
    await until(lambda: coming.waiting == 3)
    other = await client.post(URL, json=BODY | {"model": "plain"})
    assert other.status_code == 200, "nobody else waits"
    coming.arrive()
    for answer in await asyncio.gather(*asked):
        assert answer.status_code == 200
        assert answer.headers["x-prad-version"] == "2"


async def test_one_that_cannot_be_had_is_refused_with_the_cause(
    client: httpx.AsyncClient, coming: Coming
) -> None:
    coming.trouble = "damaged"
    coming.ended.set()
    answer = await client.post(URL, json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"] == "coming@2 is not here: damaged"


async def test_who_leaves_does_not_wait(
    app_of: Callable[[Any], FastAPI], engine: Any, drive: Any, coming: Coming
) -> None:
    leave = asyncio.Event()
    body = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]
    driven = drive(app_of(engine), URL, body, leave)
    await until(lambda: coming.waiting)
    leave.set()
    await driven.serving
    assert coming.waiting == 0
