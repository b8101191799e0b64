"""The official client against a real server on a loopback port."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
import uvicorn

from prefill_service.errors import DecodeUnavailableError


@pytest.fixture
async def official(app_of: Any, engine: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    config = uvicorn.Config(app_of(engine), port=0, log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    ) as client:
        yield client
    server.should_exit = True
    await serving


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
        await official.completions.create(model="e2e", prompt="x", suffix="y")
    assert refused.value.param == "suffix"


class Review(pydantic.BaseModel):
    good: bool
    stars: Literal[1, 2, 3]
    words: Annotated[list[Literal["food", "text"]], pydantic.Field(max_length=2)]


async def test_a_pydantic_model_comes_back(official: openai.AsyncOpenAI) -> None:
    """As the client asks for it: a strict schema with definitions, parsed as it comes back."""
    messages: Any = [{"role": "user", "content": "hello"}]
    for model in ("tiny/model", "talk"):
        answer = await official.chat.completions.parse(
            model=model, messages=messages, response_format=Review, max_tokens=100, temperature=1, seed=3,
            presence_penalty=0.5, logit_bias={"5": -1},
        )  # fmt: skip
        assert isinstance(answer.choices[0].message.parsed, Review)
        assert answer.choices[0].finish_reason == "stop"


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


async def test_echo_and_no_output_at_all(official: openai.AsyncOpenAI) -> None:
    scored = await official.completions.create(
        model="plain", prompt="the food", echo=True, logprobs=1, max_tokens=0,
        extra_body={"continuation": " is good", "continuation_logprobs": 0},
    )  # fmt: skip
    (choice,) = scored.choices
    assert (choice.text, choice.finish_reason) == ("the food is good", "length")
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or ()) == choice.text
    assert choice.model_extra is not None
    start = choice.model_extra["continuation"]["token"]
    told = [next(iter(token.values()))["logprob"] for token in choice.model_extra["continuation_logprobs"]]
    assert (choice.logprobs.token_logprobs or [])[start:] == told
