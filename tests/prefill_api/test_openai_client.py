"""The official client against a real server on a loopback port."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest

from prad.lm import Tokenizer
from prefill_service.api import ApiLimits, ModelInfo, create_app
from prefill_service.errors import DecodeUnavailableError
from tests.prefill_api.conftest import ScriptedEngine, catalogue_of
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
    for name in ("e2e", "e2e@1", "tiny/model"):
        assert (await official.models.retrieve(name)).id == name
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


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


async def test_tools_are_called_and_answered(tool_tokenizer: Tokenizer) -> None:
    """A whole round, whole and streamed: the answer goes back as the client has it."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    engine = ScriptedEngine(
        script=tool_tokenizer.encode_continuation(f"I look.\n{call}"), eos=tool_tokenizer.eos_id
    )
    info = ModelInfo("0123456789abcdef", 2048, len(tool_tokenizer), frozenset())
    app = create_app(engine, catalogue_of({}), tool_tokenizer, info, ApiLimits())
    messages: list[Any] = [{"role": "user", "content": "the weather"}]
    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked: Any = {"model": "tiny/model", "messages": messages, "tools": [WEATHER], "tool_choice": "auto"}
        answer = (await client.chat.completions.create(**asked)).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content == "I look."
        (called,) = answer.message.tool_calls or ()
        assert called.type == "function"
        assert json.loads(called.function.arguments) == {"city": "Oslo"}

        text, arguments, names, reason = "", "", [], None
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
            text += delta.content or ""
            for piece in delta.tool_calls or ():
                assert piece.function is not None
                names += [piece.function.name] if piece.function.name else []
                arguments += piece.function.arguments or ""
        assert (text, names, reason) == ("I look.", ["weather"], "tool_calls")
        assert arguments == called.function.arguments

        messages += [answer.message, {"role": "tool", "tool_call_id": called.id, "content": "rain"}]
        await client.chat.completions.create(**asked)
        shown = tool_tokenizer.decode(engine.requests[-1].prompt_ids)
        assert shown.endswith(f"<assistant>I look.\n{call}\n<tool {called.id}>rain\n<assistant>")


async def test_a_system_message_to_a_task_is_no_obstacle(official: openai.AsyncOpenAI, engine: Any) -> None:
    messages: Any = [{"role": "system", "content": "one"}, {"role": "user", "content": "the food"}]
    answer = await official.chat.completions.create(
        model="e2e", messages=messages, tools=[], max_tokens=3, extra_body={"return_token_ids": True}
    )
    assert answer.model_extra is not None
    assert tuple(answer.model_extra["prompt_token_ids"]) == engine.requests[-1].prompt_ids


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
