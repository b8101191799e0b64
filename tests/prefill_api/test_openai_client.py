"""The official client against a real server on a loopback port."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from prefill_service.errors import DecodeUnavailableError
from tests.prefill_api.serving import listening


@pytest.fixture
async def official(app_of: Any, engine: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        listening(app_of(engine)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_completions_chat_streams_and_errors(official: openai.AsyncOpenAI) -> None:
    whole = await official.completions.create(
        model="e2e", prompt="the food", max_tokens=6, logprobs=1, extra_body={"ignore_eos": True}
    )
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    assert whole.choices[0].logprobs is not None
    stream = await official.completions.create(
        model="e2e", prompt="the food", max_tokens=6, stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text

    messages: Any = [{"role": "user", "content": "hello"}]
    answer = await official.chat.completions.create(
        model="tiny/model", messages=messages, max_tokens=6, seed=1, extra_body={"task": "talk@1"}
    )
    assert answer.model_extra is not None
    assert answer.model_extra["prad"]["version"] == 1
    chunks = await official.chat.completions.create(
        model="talk@1", messages=messages, max_tokens=6, seed=1, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    collected = [chunk async for chunk in chunks]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in collected if chunk.choices)
    assert text == answer.choices[0].message.content
    assert collected[-1].usage == answer.usage

    assert [model.id async for model in official.models.list()][:2] == ["tiny/model", "e2e"]
    assert (await official.models.retrieve("e2e")).id == "e2e"
    with pytest.raises(openai.NotFoundError) as missing:
        await official.completions.create(model="nope", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        await official.completions.create(model="e2e", prompt="x", frequency_penalty=1)
    assert refused.value.param == "frequency_penalty"


async def test_a_stream_that_breaks_raises(official: openai.AsyncOpenAI, engine: Any) -> None:
    engine.error, engine.fail_at = DecodeUnavailableError("gone"), 3
    stream = await official.completions.create(
        model="plain", prompt="x", max_tokens=8, stream=True, logprobs=0
    )
    with pytest.raises(openai.APIError, match="gone"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_the_connection_ends_the_request(
    official: openai.AsyncOpenAI, engine: Any, stream: bool
) -> None:
    engine.pause_at = 3
    call = official.completions.create(
        model="plain",
        prompt="x",
        max_tokens=8,
        stream=stream,
        logprobs=0,
        timeout=None,
        extra_body={"ignore_eos": True},
    )
    if stream:
        chunks = await call
        await anext(aiter(chunks))
        await engine.paused.acquire()
        await chunks.close()
    else:
        asking = asyncio.create_task(call)
        await engine.paused.acquire()
        asking.cancel()
    await engine.all_closed.wait()
    assert not engine.open
