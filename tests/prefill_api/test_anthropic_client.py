"""Anthropic's own client against a real server on a loopback port, and what it never sends by hand."""

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest

from prefill_service.api import ApiAccess, ModelInfo, create_app
from prefill_service.catalogue import KeyRing
from prefill_service.errors import DecodeUnavailableError, OverloadedError
from tests.prefill_api.serving import listening
from tests.prefill_api.test_http_keys import key

HELLO: Any = [{"role": "user", "content": "hello"}]
URL = "/v1/messages"


@pytest.fixture
async def official(app_of: Any, engine: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with (
        listening(app_of(engine)) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """The same of OpenAI's endpoint."""
    return (await client.post("/v1/chat/completions", json=body)).json()  # type: ignore[no-any-return]


async def test_a_message_is_the_chat_s_answer(
    official: anthropic.AsyncAnthropic, client: httpx.AsyncClient
) -> None:
    system: Any = [{"type": "text", "text": "You are terse.", "cache_control": {"type": "ephemeral"}}]
    message = await official.messages.create(
        model="talk@1", max_tokens=6, messages=HELLO, system=system, extra_body={"seed": 1}
    )
    turns = [{"role": "system", "content": "You are terse."}, *HELLO]
    same = await chat(client, model="talk@1", messages=turns, max_tokens=6, seed=1)
    (block,) = message.content
    assert block.type == "text"
    assert block.text == same["choices"][0]["message"]["content"]
    assert (
        message.stop_reason
        == {"stop": "end_turn", "length": "max_tokens"}[same["choices"][0]["finish_reason"]]
    )
    usage = same["usage"]
    assert (message.usage.input_tokens, message.usage.output_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert (message.model, message.role, message._request_id is not None) == ("talk@1", "assistant", True)
    assert message.model_extra is not None
    assert message.model_extra["prad"]["version"] == 1
    counted = await official.messages.count_tokens(model="talk@1", messages=HELLO, system=system)
    assert counted.input_tokens == usage["prompt_tokens"]
    begun: Any = [*HELLO, {"role": "assistant", "content": "It is one"}]
    message = await official.messages.create(model="talk@1", max_tokens=6, messages=begun)
    counted = await official.messages.count_tokens(model="talk@1", messages=begun)
    assert counted.input_tokens == message.usage.input_tokens, "with what the answer goes on from"


async def test_a_stream_ends_as_the_message_that_it_is(official: anthropic.AsyncAnthropic) -> None:
    asked: Any = {
        "model": "talk",
        "max_tokens": 6,
        "messages": HELLO,
        "extra_body": {"seed": 1, "ignore_eos": True},
    }
    whole = await official.messages.create(**asked)
    async with official.messages.stream(**asked) as stream:
        kinds = [event.type async for event in stream if event.type != "text"]
        final: Any = await stream.get_final_message()
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert (final.content[0].text, final.stop_reason, final.usage.output_tokens) == (
        whole.content[0].text,
        "max_tokens",
        whole.usage.output_tokens,
    )


async def test_refusals_are_worded_as_its_clients_expect(
    official: anthropic.AsyncAnthropic, engine: Any
) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        await official.messages.create(model="nope", max_tokens=1, messages=HELLO)
    body: Any = missing.value.body
    assert (body["type"], body["error"]["type"], body["error"]["code"]) == (
        "error",
        "not_found_error",
        "model_not_found",
    )
    engine.error, engine.fail_at = OverloadedError("full", retry_after=7), 0
    with pytest.raises(anthropic.RateLimitError) as full:
        await official.messages.create(model="talk", max_tokens=1, messages=HELLO)
    assert full.value.response.headers["retry-after"] == "7"
    assert full.value.request_id == full.value.response.headers["x-request-id"]


async def test_paths_that_nobody_serves_are_refused_in_its_words(
    official: anthropic.AsyncAnthropic, client: httpx.AsyncClient
) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        await official.messages.batches.list()
    body: Any = missing.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    assert body["error"]["message"] == "there is no /v1/messages/batches: GET / says where things are"
    got = (await client.get(URL)).json()
    assert (got["type"], got["error"]["type"]) == ("error", "invalid_request_error")
    assert "expected POST" in got["error"]["message"]


async def test_a_stream_that_breaks_raises(official: anthropic.AsyncAnthropic, engine: Any) -> None:
    engine.error, engine.fail_at = DecodeUnavailableError("gone"), 6
    stream = await official.messages.create(
        model="talk", max_tokens=8, messages=HELLO, stream=True, extra_body={"ignore_eos": True, "seed": 1}
    )
    with pytest.raises(anthropic.APIStatusError, match="gone"):
        async for _ in stream:
            pass


async def test_closing_the_stream_ends_the_request(official: anthropic.AsyncAnthropic, engine: Any) -> None:
    """An event comes with text, and of one seed in twenty (such as 1) there is none before the pause."""
    engine.pause_at = 3
    stream = await official.messages.create(
        model="talk", max_tokens=8, messages=HELLO, stream=True, extra_body={"ignore_eos": True, "seed": 2}
    )
    await anext(aiter(stream))
    await engine.paused.acquire()
    await stream.close()
    await engine.all_closed.wait()
    assert not engine.open


async def test_the_key_comes_in_its_own_header(
    engine: Any, tokenizer: Any, language_model: Any, catalogue: Any
) -> None:
    ring = KeyRing()
    ring.replace([key("alice", tasks=("talk",))])
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())
    app = create_app(engine, catalogue, tokenizer, info, access=ApiAccess(keys=ring))
    body = {"model": "talk", "max_tokens": 2, "messages": HELLO}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for headers, status, kind in (
            ({"x-api-key": "alice"}, 200, None),
            ({"authorization": "Bearer alice"}, 200, None),
            ({"x-api-key": "mallory"}, 401, "authentication_error"),
            ({}, 401, "authentication_error"),
        ):
            answer = await client.post(URL, json=body, headers=headers)
            assert (answer.status_code, answer.json().get("error", {}).get("type")) == (status, kind)
        other = await client.post(URL, json=body | {"model": "e2e"}, headers={"x-api-key": "alice"})
        assert (other.status_code, other.json()["error"]["type"]) == (403, "permission_error")
        elsewhere = await client.get("/v1/models", headers={"x-api-key": "mallory"})
        assert elsewhere.json()["error"]["code"] == "invalid_api_key"
    async with (
        listening(app) as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="alice", max_retries=0) as official,
    ):
        assert "talk" in [model.id async for model in official.models.list()]


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking", "not supported yet"),
        ({"n": 2}, "n", "unknown field"),
        ({"nonsense": 2}, "nonsense", "unknown field"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0", '"image"'),
        ({"messages": []}, "messages", "at least 1"),
        ({"system": [{"type": "image"}]}, "system", "text"),
        ({"temperature": "hot"}, "temperature", "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences", "non-empty"),
    ],
)
async def test_what_is_wrong_is_named_as_it_was_sent(
    client: httpx.AsyncClient, wrong: dict[str, Any], param: str, words: str
) -> None:
    body = {
        k: v
        for k, v in ({"model": "talk", "max_tokens": 2, "messages": HELLO} | wrong).items()
        if v is not None
    }
    refused = await client.post(URL, json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_sequence_that_ended_it_is_named(app_of: Any, scripted: Any, stream: bool) -> None:
    app = app_of(scripted("hello there five"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        body = {"model": "talk", "max_tokens": 9, "messages": HELLO, "stop_sequences": ["zero", "there"]}
        answer = await client.post(URL, json=body | {"stream": stream})
        told = '"stop_reason":"stop_sequence","stop_sequence":"there"'
        assert told in answer.text
        ended = await client.post(URL, json=body | {"stream": stream, "stop_sequences": ["zero"]})
        assert '"stop_reason":"end_turn","stop_sequence":null' in ended.text
