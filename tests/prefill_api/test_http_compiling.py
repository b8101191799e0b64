"""Grammars that wait to be compiled: how many may, how long, and that nobody waits for a client that left."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import httpx
import pytest

from prad.lm import Grammar, Grammars, Tokenizer
from prefill_service.api import ApiAccess, ModelInfo, compiling, create_app
from prefill_service.api.rules import Constraint
from prefill_service.catalogue import KeyRing, TaskCatalogue
from prefill_service.errors import OverloadedError
from tests.prefill_api.test_http_keys import key, shown

URL = "/v1/completions"
GUIDED = {"model": "plain", "prompt": "the food", "max_tokens": 2, "guided_choice": ["a", "b"]}


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[tuple[Grammars, str]]]]:
    """Compiling goes on once the event is set; of whom it is wanted, and what."""
    goes_on, wanted, compiled = threading.Event(), list[tuple[Grammars, str]](), Grammars.compiled

    def waits(grammars: Grammars, text: str) -> Any:
        wanted.append((grammars, text))
        goes_on.wait()
        return compiled(grammars, text)

    monkeypatch.setattr(Grammars, "compiled", waits)
    yield goes_on, wanted
    goes_on.set()


async def until(wanted: list[tuple[Grammars, str]], waiting: int) -> None:
    while not wanted or wanted[0][0].waiting != waiting:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_no_more_wait_than_may(
    client: httpx.AsyncClient, stuck: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MOST_COMPILING", 4)
    goes_on, wanted = stuck
    waiting = [asyncio.create_task(client.post(URL, json=GUIDED)) for _ in range(4)]
    await until(wanted, 4)
    refused = await client.post(URL, json=GUIDED)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert "retry-after" in refused.headers
    goes_on.set()
    assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}
    assert wanted[0][0].waiting == 0


async def test_nobody_waits_for_ever(
    client: httpx.AsyncClient, stuck: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "COMPILING_S", 0.02)
    refused = await client.post(URL, json=GUIDED)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert "guided_choice" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", [URL, "/v1/chat/completions"])
async def test_who_leaves_gives_up_the_turn(
    app_of: Any, engine: Any, drive: Any, stuck: Any, path: str
) -> None:
    _, wanted = stuck
    app, leave = app_of(engine), asyncio.Event()
    user = {"messages": [{"role": "user", "content": "hi"}]}
    body = GUIDED if path == URL else {**GUIDED, **user}
    sent = json.dumps({k: v for k, v in body.items() if path == URL or k != "prompt"}).encode()
    messages = [{"type": "http.request", "body": sent, "more_body": False}]
    driven = [drive(app, path, [*messages], leave) for _ in range(6)]
    await until(wanted, 6)
    leave.set()
    await asyncio.gather(*(each.serving for each in driven))
    assert wanted[0][0].waiting == 2, "those that are being compiled"
    assert not any(each.sent for each in driven)


async def test_grammars_of_one_key_hold_up_no_other_s(
    engine: Any,
    catalogue: TaskCatalogue,
    tokenizer: Tokenizer,
    stuck: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads compile: one key's grammars take one of them, whatever they cost, however many they are."""
    goes_on, begun = stuck
    monkeypatch.setattr(compiling, "MOST_COMPILING", 5)
    ring = KeyRing()
    ring.replace([key("alice"), key("bob")])
    info = ModelInfo("0123456789abcdef", 128, len(tokenizer), frozenset())
    app = create_app(engine, catalogue, tokenizer, info, access=ApiAccess(keys=ring))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

        def asked(name: str, choice: str) -> "asyncio.Task[httpx.Response]":
            sent = {"json": GUIDED | {"guided_choice": [choice]}, "headers": shown(name)}
            return asyncio.create_task(client.post(URL, **sent))  # type: ignore[arg-type]

        try:
            of_alice = [asked("alice", f"alice's {number}") for number in range(6)]
            (refused,), _ = await asyncio.wait(of_alice, return_when=asyncio.FIRST_COMPLETED)
            error = refused.result().json()["error"]
            assert (refused.result().status_code, error["code"]) == (429, "overloaded")
            of_bob = asked("bob", "bob's")
            while len(begun) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            assert ["alice" in begun[0][1], "bob" in begun[1][1], len(begun)] == [True, True, 2]
        finally:
            goes_on.set()
        answers = await asyncio.gather(*of_alice, of_bob)
    assert sorted(answer.status_code for answer in answers) == [200] * 6 + [429]
    assert len(begun) == 6


def queued(queue: compiling.CompileQueue, key: str | None, choice: str) -> "asyncio.Task[Future[Grammar]]":
    constraint = Constraint("choice", [choice], "guided_choice")
    return asyncio.create_task(queue.compiled(constraint, spaced=False, key=key))


@pytest.fixture
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(lambda: tokenizer, len(tokenizer))
    yield made
    made.close()


async def test_what_is_compiled_already_waits_for_no_turn(grammars: Grammars, stuck: Any) -> None:
    goes_on, wanted = stuck
    queue = compiling.CompileQueue(grammars)
    goes_on.set()
    known = (await queued(queue, "alice", "known")).result()
    goes_on.clear()
    new = queued(queue, "alice", "new")
    await until(wanted, 1)
    assert (await asyncio.wait_for(queued(queue, "alice", "known"), 5)).result() is known
    assert not new.done()
    goes_on.set()
    assert (await new).result() is not known


async def test_a_turn_is_over_when_its_thread_is_free(grammars: Grammars, stuck: Any) -> None:
    """Those who leave one after another take no second thread."""
    goes_on, wanted = stuck
    queue = compiling.CompileQueue(grammars)
    left = [queued(queue, "alice", f"{number}") for number in range(4)]
    await until(wanted, 1)
    for each in left:
        each.cancel()
        await asyncio.wait([each])
        await asyncio.sleep(0.01)
    more = queued(queue, "alice", "more")
    of_bob = queued(queue, "bob", "b")
    await until(wanted, 2)
    goes_on.set()
    await asyncio.gather(more, of_bob)
    assert len(wanted) == 3, "the first of alice's, bob's, and the one that did not leave"


async def test_who_shows_no_key_is_refused_by_no_other_s_count(
    grammars: Grammars, stuck: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "MOST_COMPILING", 2)
    goes_on, wanted = stuck
    queue = compiling.CompileQueue(grammars)
    asked = [queued(queue, key, f"{key} {number}") for key in ("a", "b", None) for number in range(2)]
    await until(wanted, 4)
    with pytest.raises(OverloadedError):
        await queued(queue, None, "third")
    goes_on.set()
    await asyncio.gather(*asked)
