"""Tools and structured output through the other protocols, as Anthropic's and OpenAI's clients have them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from prad.lm import LanguageModel, Tokenizer
from prefill_service.api import ModelInfo, create_app
from tests.prefill_api.conftest import ModelEngine, ScriptedEngine, catalogue_of
from tests.prefill_api.serving import listening
from tests.prefill_api.test_openai_client import Review

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


@pytest.fixture
async def calling(tool_tokenizer: Tokenizer) -> AsyncIterator[tuple[str, ScriptedEngine]]:
    """A model that looks, and calls a tool; where it listens."""
    script = tool_tokenizer.encode_continuation(f"I look.\n{CALL}")
    engine = ScriptedEngine(script=script, eos=tool_tokenizer.eos_id)
    info = ModelInfo("0123456789abcdef", 2048, len(tool_tokenizer), frozenset())
    async with listening(create_app(engine, catalogue_of({}), tool_tokenizer, info)) as url:
        yield url, engine


async def test_anthropic_s_client_calls_a_tool_and_answers(
    calling: tuple[str, ScriptedEngine], tool_tokenizer: Tokenizer
) -> None:
    url, engine = calling
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        turns: list[Any] = [{"role": "user", "content": "the weather"}]
        asked: Any = {"model": "tiny/model", "max_tokens": 200, "messages": turns}
        asked["tools"] = [{"name": "weather", "description": "of a city", "input_schema": SCHEMA}]
        message = await client.messages.create(**asked)
        text, used = message.content
        assert (text.type, used.type, message.stop_reason) == ("text", "tool_use", "tool_use")
        assert text.type == "text"
        assert text.text == "I look."
        assert used.type == "tool_use"
        assert (used.name, used.input) == ("weather", {"city": "Oslo"})
        async with client.messages.stream(**asked) as stream:
            streamed = await stream.get_final_message()
        assert [block.type for block in streamed.content] == ["text", "tool_use"]
        assert streamed.content[1].type == "tool_use"
        assert (streamed.content[1].name, streamed.content[1].input) == ("weather", {"city": "Oslo"})
        assert streamed.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": used.id, "content": "rain"}
        turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
        await client.messages.create(**asked)
    shown = tool_tokenizer.decode(engine.requests[-1].prompt_ids)
    assert f"I look.\n{CALL}\n<tool {used.id}>rain" in shown


async def test_openai_s_responses_call_a_function_and_answer(
    calling: tuple[str, ScriptedEngine], tool_tokenizer: Tokenizer
) -> None:
    url, engine = calling
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        tools: Any = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
        asked: Any = {"model": "tiny/model", "input": "the weather", "tools": tools}
        response = await client.responses.create(**asked)
        assert response.output_text == "I look."
        (called,) = (item for item in response.output if item.type == "function_call")
        assert (called.name, json.loads(called.arguments)) == ("weather", {"city": "Oslo"})
        async with client.responses.stream(**asked) as stream:
            events: list[Any] = [event async for event in stream]
            streamed = await stream.get_final_response()
        arguments = "".join(event.delta for event in events if "arguments.delta" in event.type)
        assert json.loads(arguments) == {"city": "Oslo"}
        assert [item.type for item in streamed.output] == [item.type for item in response.output]
        output: Any = [{"type": "function_call_output", "call_id": called.call_id, "output": "rain"}]
        await client.responses.create(**asked | {"input": output, "previous_response_id": response.id})
    shown = tool_tokenizer.decode(engine.requests[-1].prompt_ids)
    assert f"I look.\n{CALL}\n<tool {called.call_id}>rain" in shown


@pytest.mark.parametrize("arguments", ['{"city": "Os', "[]", "nothing", '{"a":' * 300 + "1" + "}" * 300])
async def test_a_call_that_is_cut_or_no_object_is_told_and_taken_back(
    tool_tokenizer: Tokenizer, arguments: str
) -> None:
    said = f'<tool_call>{{"name": "weather", "arguments": {arguments}'
    cut = len(tool_tokenizer.encode_continuation(said))
    script = tool_tokenizer.encode_continuation(f"{said}}}</tool_call>")
    engine = ScriptedEngine(script=script, eos=tool_tokenizer.eos_id)
    info = ModelInfo("0123456789abcdef", 8192, len(tool_tokenizer), frozenset())
    app = create_app(engine, catalogue_of({}), tool_tokenizer, info)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        turns = [{"role": "user", "content": "the weather"}]
        tool = {"name": "weather", "input_schema": SCHEMA}
        asked = {"model": "tiny/model", "messages": turns, "tools": [tool]}
        for most, reason in ((cut, "max_tokens"), (5000, "tool_use")):
            answer = await client.post("/v1/messages", json=asked | {"max_tokens": most})
            assert answer.status_code == 200, answer.text
            body = answer.json()
            if body["stop_reason"] == "end_turn":
                continue  # what never was a call's end is content
            assert (body["content"][0]["input"], body["stop_reason"]) == ({}, reason)
        function = {"type": "function", "name": "weather", "parameters": SCHEMA}
        asked = {"model": "tiny/model", "input": "the weather", "tools": [function]}
        for stream in (False, True):
            answer = await client.post(
                "/v1/responses", json=asked | {"max_output_tokens": cut, "stream": stream}
            )
            assert answer.status_code == 200
            told = answer.text.rpartition("data: ")[2] if stream else answer.text
            response = json.loads(told)
            response = response["response"] if stream else response
            assert (response["status"], response["output"][-1]["status"]) == ("incomplete", "incomplete")
            more = {"previous_response_id": response["id"], "input": "again", "max_output_tokens": 2}
            answer = await client.post("/v1/responses", json=asked | more)
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"max_tokens": 2, "tool_choice": {"type": "any"}}),
        ("/v1/messages", {"max_tokens": 2, "tool_choice": {"type": "tool", "name": "weather"}, "tools": []}),
        ("/v1/messages/count_tokens", {"tool_choice": {"type": "any"}}),
        ("/v1/responses", {"tool_choice": "required"}),
        ("/v1/responses", {"tool_choice": {"type": "function", "name": "weather"}, "tools": []}),
        ("/v1/responses", {"tool_choice": {"type": "web_search"}}),
    ],
)
async def test_a_choice_of_tools_needs_tools(client: httpx.AsyncClient, path: str, body: Any) -> None:
    own = {"input": "x"} if "responses" in path else {"messages": [{"role": "user", "content": "x"}]}
    answer = await client.post(path, json={"model": "talk", **own, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")


async def test_openai_s_responses_keep_to_a_pydantic_model(
    tokenizer: Tokenizer, language_model: LanguageModel
) -> None:
    info = ModelInfo("0123456789abcdef", 1024, len(tokenizer), frozenset())
    app = create_app(ModelEngine(model=language_model), catalogue_of({}), tokenizer, info)
    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        response = await client.responses.parse(
            model="tiny/model", input="hello", text_format=Review, temperature=1, extra_body={"seed": 3}
        )
    assert isinstance(response.output_parsed, Review)
