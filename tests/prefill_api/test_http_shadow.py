"""A share of the requests for a task also runs under another version: unseen, bounded, told by metrics."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapter_registry.routing import Routing
from prad.core.sampling import Token
from prad.lm import Tokenizer
from prefill_service.api.shadow import MOST_AT_ONCE
from prefill_service.catalogue import TaskCatalogue, TaskVersions
from prefill_service.errors import OverloadedError
from prefill_service.prompt import PromptRequest
from tests.prefill_api.conftest import ScriptedEngine


@dataclass
class TwoVersions(ScriptedEngine):
    """Version 1, which answers, says `script`; version 2 says `other`."""

    other: list[int] = field(default_factory=list)

    def next_tokens(self, request: PromptRequest, outputs: Sequence[list[int]], step: int) -> list[Token]:
        script = self.script if request.version is None or request.version.version == 1 else self.other
        token = script[step] if step < len(script) else self.eos
        return [Token(token, -0.5, ((token, -0.5),))] * request.choices


@asynccontextmanager
async def shadowing(
    app_of: Callable[[Any], FastAPI], catalogue: TaskCatalogue, engine: Any, percent: float = 100.0
) -> AsyncIterator[httpx.AsyncClient]:
    before = {each.name: each.routed for each in catalogue.tasks()}
    routing = Routing(revision=42, split={1: 100}, aliases={"canary": 1}, shadow={2: percent})
    catalogue.replace({name: TaskVersions.of(routing, routed.versions) for name, routed in before.items()})
    transport = httpx.ASGITransport(app_of(engine))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
    finally:
        catalogue.replace(before)


async def told(client: httpx.AsyncClient, **wanted: str) -> dict[str, float]:
    """The shadow metrics: the sum over all that have these labels."""
    found: dict[str, float] = {}
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("prad_shadow") and all(
            f'{name}="{value}"' in line for name, value in wanted.items()
        ):
            name = line.partition("{")[0].removeprefix("prad_shadow_")
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found


async def ended(client: httpx.AsyncClient, outcome: str, count: int = 1) -> None:
    while (await told(client, outcome=outcome)).get("requests_total", 0.0) < count:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@pytest.fixture
def words(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_prompt("the restaurant by the river serves food")


async def test_both_versions_are_compared_and_the_client_sees_one(
    app_of: Any, catalogue: TaskCatalogue, words: list[int]
) -> None:
    one, other = words[:6], [*words[:4], words[0], words[0]]
    engine = TwoVersions(script=one, other=other)
    body = {"task": "plain", "prompt": "the food", "max_tokens": 6, "temperature": 0, "n": 2}
    async with shadowing(app_of, catalogue, engine) as client:
        answer = (await client.post("/v1/completions", json=body)).json()
        assert answer["prad"]["version"] == 1
        assert answer["usage"]["completion_tokens"] == 12
        await ended(client, "compared")
        engine.other = one
        stream = body | {"stream": True, "n": 1, "logprobs": 2}
        assert "[DONE]" in (await client.post("/v1/completions", json=stream)).text
        await ended(client, "compared", 2)
        live, shadow, _, again = engine.requests
        assert (shadow.version.version, shadow.choices, shadow.gives_way) == (2, 1, True)
        assert (again.sampling.logprobs, again.sampling.greedy, again.sampling.max_tokens) == (None, True, 6)
        assert live.gives_way is False
        found = await told(client, task="plain", version="1", shadow="2")
        assert (found["equal_answers_total"], found["tokens_total"]) == (1, 12)
        assert found["equal_tokens_total"] == 10
        for version, role in (("1", "live"), ("2", "shadow")):
            timed = await told(client, task="plain", version=version, role=role)
            assert (timed["first_token_seconds_count"], timed["duration_seconds_count"]) == (2, 2)
        page = (await client.get("/metrics")).text
        assert 'prad_completion_tokens_total{task="plain",version="1"} 18.0' in page
        assert 'prad_completion_tokens_total{task="plain",version="2"}' not in page
        assert 'prad_task_shadow_percent{task="plain",version="2"} 100.0' in page


async def test_the_copy_goes_no_further_than_the_answer(
    app_of: Any, catalogue: TaskCatalogue, tokenizer: Tokenizer
) -> None:
    """Here a stop text ends that."""
    script = tokenizer.encode_prompt("the food END of the text")
    engine = TwoVersions(script=script, other=script)
    async with shadowing(app_of, catalogue, engine) as client:
        chat = {"model": "talk", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        for path, body in (
            ("completions", {"task": "e2e", "prompt": "the food", "max_tokens": 12}),
            ("chat/completions", chat | {"stop": "END", "max_completion_tokens": 12}),
        ):
            answer = (await client.post(f"/v1/{path}", json=body)).json()
            assert answer["choices"][0]["finish_reason"] == "stop"
            await ended(client, "compared", 1 + (path != "completions"))
            assert engine.requests[-1].sampling.max_tokens == answer["usage"]["completion_tokens"] < 12
        found = await told(client)
        assert found["equal_answers_total"] == 2
        assert found["equal_tokens_total"] == found["tokens_total"]


async def test_what_was_drawn_is_timed_only(app_of: Any, catalogue: TaskCatalogue, words: list[int]) -> None:
    async with shadowing(app_of, catalogue, TwoVersions(script=words, other=words)) as client:
        body = {"task": "plain", "prompt": "the food", "max_tokens": 3, "temperature": 1}
        await client.post("/v1/completions", json=body)
        await ended(client, "timed")
        assert (await told(client)).get("tokens_total", 0.0) == 0.0


@pytest.mark.parametrize(
    "body",
    [
        {"task": "plain@1"},
        {"task": "plain@canary"},
        {"model": "tiny/model"},
        {"task": "plain", "use_beam_search": True, "n": 2},
    ],
)
async def test_what_has_no_shadow(
    app_of: Any, catalogue: TaskCatalogue, words: list[int], body: dict[str, Any]
) -> None:
    engine = TwoVersions(script=words, other=words)
    async with shadowing(app_of, catalogue, engine) as client:
        body |= {"prompt": "the food", "max_tokens": 2}
        if "use_beam_search" not in body:
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        else:
            engine.error, engine.fail_at = OverloadedError("full"), 0
            assert (await client.post("/v1/completions", json=body)).status_code == 429
        await asyncio.sleep(0.03)
        assert not any(request.gives_way for request in engine.requests)


async def test_a_share_is_a_share(app_of: Any, catalogue: TaskCatalogue) -> None:
    async with shadowing(app_of, catalogue, None, percent=20.0):
        (entry,) = (entry for entry in catalogue.tasks() if entry.name == "plain")
        drawn = [catalogue.shadow("plain", entry.default) for _ in range(2000)]
        assert 250 < sum(found is not None for found in drawn) < 550
        assert {found.version for found in drawn if found is not None} == {2}
        assert catalogue.shadow("plain", entry.routed.versions[2]) is None


async def test_whatever_is_in_its_way_drops_it_and_nobody_hears_of_it(
    app_of: Any, catalogue: TaskCatalogue, words: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    engine = TwoVersions(script=words, other=words, fail_at=1, fails=lambda request: request.gives_way)
    body = {"task": "plain", "prompt": "the food", "max_tokens": 3, "temperature": 0}
    async with shadowing(app_of, catalogue, engine) as client:
        for error, outcome in ((OverloadedError("others wait"), "dropped"), (RuntimeError("no"), "failed")):
            engine.error = error
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            await ended(client, outcome)
        page = (await client.get("/metrics")).text
        assert 'status="200",task="plain",version="1"} 2.0' in page
    assert "a request for plain@1 failed as plain@2" in caplog.text
    assert "the food" not in caplog.text


async def test_few_run_at_once(app_of: Any, catalogue: TaskCatalogue, words: list[int]) -> None:
    engine = TwoVersions(script=words, other=words, pause_at=0, pauses=lambda request: request.gives_way)
    body = {"task": "plain", "prompt": "the food", "max_tokens": 3, "temperature": 0}
    async with shadowing(app_of, catalogue, engine) as client:
        for _ in range(MOST_AT_ONCE + 2):
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        await ended(client, "dropped", 2)
        assert sum(request.gives_way for request in engine.requests) <= MOST_AT_ONCE
        engine.resume.set()
        await ended(client, "compared", MOST_AT_ONCE)


async def test_a_version_that_has_no_place_for_the_prompt(
    app_of: Any, catalogue: TaskCatalogue, words: list[int]
) -> None:
    (virtual,) = (entry for entry in catalogue.tasks() if entry.name == "virtual")
    (plain,) = (entry for entry in catalogue.tasks() if entry.name == "plain")
    engine = TwoVersions(script=words, other=words)
    async with shadowing(app_of, catalogue, engine) as client:
        versions = {1: plain.routed.versions[1], 2: virtual.routed.versions[2]}
        routing = Routing(revision=43, split={1: 100}, shadow={2: 100.0})
        rest = {each.name: each.routed for each in catalogue.tasks()}
        catalogue.replace(rest | {"plain": TaskVersions.of(routing, versions)})
        ids = [words[0]] * 120
        body = {"task": "plain", "prompt": ids, "raw_prompt": True, "max_tokens": 3, "temperature": 0}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        await ended(client, "refused")
