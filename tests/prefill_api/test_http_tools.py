"""Tools in /v1/chat/completions: into the prompt, and out of the answer; a scripted model with a template."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from prad.lm import Tokenizer
from prefill_service.api import ApiLimits, ModelInfo, create_app
from tests.prefill_api.conftest import TOOL_TEMPLATE, ScriptedEngine, catalogue_of, record, tokenizer_of

MISTRAL = TOOL_TEMPLATE.replace("<tool_call>", "[TOOL_CALLS] [").replace("</tool_call>", "]")
UNKNOWN = TOOL_TEMPLATE.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")
MARK = "[TOOL_CALLS]"

USER = {"role": "user", "content": "the weather"}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "tells it", "parameters": WEATHER},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@asynccontextmanager
async def serving(tokenizer: Tokenizer, says: str = "") -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    engine = ScriptedEngine(script=tokenizer.encode_continuation(says), eos=tokenizer.eos_id)
    tasks = catalogue_of(
        {"talk": record(template="Q: {prompt}", chat_template=True), "e2e": record(template="I {prompt} O:")}
    )
    info = ModelInfo("0123456789abcdef", 2048, len(tokenizer), frozenset())
    app = create_app(engine, tasks, tokenizer, info, ApiLimits(max_body_bytes=300_000))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client, engine


async def chat(client: httpx.AsyncClient, *messages: dict[str, Any], **body: Any) -> httpx.Response:
    sent = {"messages": list(messages or (USER,)), **body}
    return await client.post("/v1/chat/completions", json=sent)


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    *lines, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_tools_and_their_turns_stand_in_the_prompt(tool_tokenizer: Tokenizer) -> None:
    called = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "O<|end|>slo"}'},
    }
    turns: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "<|end|>rain"},
    ]
    async with serving(tool_tokenizer) as (client, engine):
        for task in (None, "talk"):
            answer = await chat(client, *turns, task=task, tools=[TOOL, CLOCK], max_tokens=1)
            assert answer.status_code == 200, answer.text
        plain, adapted = (tool_tokenizer.decode(request.prompt_ids) for request in engine.requests)
        assert all(tool_tokenizer.eos_id not in request.prompt_ids for request in engine.requests)
    listed = "".join(f"<tool>{json.dumps(tool)}\n" for tool in (TOOL, CLOCK))
    called_text = '<tool_call>\n{"name": "weather", "arguments": {"city": "O<|end|>slo"}}\n</tool_call>'
    assert plain == (
        f"{listed}<user>the weather\n<assistant>\n{called_text}\n<tool c1><|end|>rain\n<assistant>"
    )
    assert adapted == plain.replace("<user>the weather", "<user>Q: the weather")


async def test_a_model_that_is_told_of_none_sees_none(tool_tokenizer: Tokenizer) -> None:
    async with serving(tool_tokenizer, CALL) as (client, engine):
        for body in ({"tools": [TOOL], "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}, {}):
            (choice,) = (await chat(client, **body)).json()["choices"]
            assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
            assert choice["finish_reason"] == "stop"
        assert {request.prompt_ids for request in engine.requests} == {
            tuple(tool_tokenizer.encode_chat([USER])),
        }


@pytest.mark.parametrize("arguments", ['{"city": "Os', "[]", "", "{'a': 1}", '{"a":' * 300 + "1" + "}" * 300])
async def test_a_call_that_the_model_wrote_badly_is_taken_back(
    tool_tokenizer: Tokenizer, arguments: str
) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "content": "no JSON"},
    ]
    async with serving(tool_tokenizer) as (client, engine):
        answer = await chat(client, *turns, tools=[TOOL], max_tokens=1)
        assert answer.status_code == 200, answer.text
        shown = tool_tokenizer.decode(engine.requests[-1].prompt_ids)
    assert '{"name": "weather", "arguments": {}}' in shown


async def test_calls_are_found_in_the_answer(tool_tokenizer: Tokenizer) -> None:
    said = f"I look.\n{CALL}\n{CALL}"
    async with serving(tool_tokenizer, said) as (client, _):
        (choice,) = (await chat(client, tools=[TOOL])).json()["choices"]
        first, second = choice["message"]["tool_calls"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
        assert first["function"] == second["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
        assert (first["type"], first["id"] != second["id"]) == ("function", True)
        (choice,) = (await chat(client, tools=[TOOL], parallel_tool_calls=False)).json()["choices"]
        assert len(choice["message"]["tool_calls"]) == 1
        (choice,) = (await chat(client, tools=[CLOCK])).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (said, "stop")
        (choice,) = (await chat(client, tools=[TOOL], max_tokens=3)).json()["choices"]
        assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("length", False)


async def test_a_stream_has_the_same_in_pieces(tool_tokenizer: Tokenizer) -> None:
    async with serving(tool_tokenizer, f"I look.\n{CALL}\n{CALL}") as (client, _):
        streamed = chunks(await chat(client, tools=[TOOL], n=2, stream=True, logprobs=True))
        for index in (0, 1):
            opening, *news = [c for chunk in streamed for c in chunk["choices"] if c["index"] == index]
            assert opening["delta"] == {"role": "assistant", "content": None}
            assert "".join(c["delta"].get("content", "") for c in news) == "I look."
            entries = [entry for c in news for entry in c["delta"].get("tool_calls", [])]
            for at in (0, 1):
                first, *rest = [entry for entry in entries if entry["index"] == at]
                assert (first["type"], first["function"]["name"]) == ("function", "weather")
                assert all(entry.keys() == {"index", "function"} for entry in rest)
                arguments = "".join(entry["function"]["arguments"] for entry in (first, *rest))
                assert arguments == '{"city": "Oslo"}'
                assert len(rest) > 1, "they come as they are written"
            assert [c["finish_reason"] for c in news if c["finish_reason"]] == ["tool_calls"]
            told = [entry for c in news if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert "".join(entry["token"] for entry in told).startswith(f"I look.\n{CALL}")
        bare = chunks(await chat(client, tools=[TOOL], stream=True))
        assert all(c["delta"] or c["finish_reason"] for chunk in bare for c in chunk["choices"])


async def test_a_special_token_that_opens_calls_is_seen(tmp_path: Path) -> None:
    """Mistral's; elsewhere it is left out like any other."""
    tokenizer = tokenizer_of(tmp_path, MISTRAL, MARK)
    assert tokenizer.token_id(MARK) in tokenizer.special_ids
    said = f'{MARK} [{{"name": "weather", "arguments": {{"city": "Oslo"}}}}]'
    async with serving(tokenizer, said) as (client, _):
        (choice,) = (await chat(client, tools=[TOOL])).json()["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert (call["function"]["arguments"], len(call["id"])) == ('{"city": "Oslo"}', 9)
        (choice,) = (await chat(client)).json()["choices"]
        assert choice["message"]["content"] == said.removeprefix(MARK)


async def test_what_has_no_place_for_tools_refuses_them(
    tool_tokenizer: Tokenizer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    unknown = tokenizer_of(tmp_path, UNKNOWN)
    result = {"role": "tool", "content": "rain"}
    cases: list[tuple[Tokenizer, list[Any], dict[str, Any], str, str]] = [
        (tokenizer, [USER], {"tools": [TOOL]}, "tools", "takes no tools"),
        (tokenizer, [USER, result], {}, "messages", "takes no tools"),
        (unknown, [USER], {"tools": [TOOL]}, "tools", "is not known here"),
        (
            tool_tokenizer,
            [USER],
            {"tools": [TOOL], "task": "e2e"},
            "tools",
            "not trained on the chat template",
        ),
    ]
    for its, messages, body, param, message in cases:
        async with serving(its) as (client, engine):
            error = (await chat(client, *messages, **body)).json()["error"]
            assert (error["code"], error["param"]) == ("tools_not_supported", param)
            assert message in error["message"]
            assert not engine.requests
            assert (await chat(client, tools=[TOOL], tool_choice="none")).status_code == 200
    async with serving(unknown) as (client, _):
        assert (await chat(client, USER, result)).status_code == 200, "it sees results, whatever it writes"


def nested(depth: int) -> dict[str, Any]:
    return {"x": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs 'tools'"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", '"required"'),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "expected one of 'tools'",
        ),
        ({"tools": [TOOL, TOOL]}, "tools", "'weather' twice"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128 items"),
        ({"tools": [{**TOOL, "type": "x"}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": nested(40)}}]},
            "tools.0.function.parameters",
            "up to 32 objects",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"x": "y" * 70_000}}}]},
            "tools.0.function.parameters",
            "up to 65536 bytes",
        ),
        ({"functions": [{"name": "x"}]}, "functions", "not supported yet"),
        ({"chat_template_kwargs": nested(40)}, "chat_template_kwargs", "up to 32"),
        (
            {"chat_template_kwargs": {f"x{i}": 1 for i in range(17)}},
            "chat_template_kwargs",
            "up to 16 names",
        ),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs", "enable_thinking"),
        ({"chat_template_kwargs": {"padding": True}}, "chat_template_kwargs", 'does not read "padding"'),
    ],
)
async def test_bad_tools_are_refused_by_name(
    tool_tokenizer: Tokenizer, body: dict[str, Any], param: str, message: str
) -> None:
    async with serving(tool_tokenizer) as (client, _):
        response = await chat(client, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), response.text
    assert message in error["message"]


@pytest.mark.parametrize(
    ("message", "param", "expected"),
    [
        ({"role": "user", "content": "x", "tool_calls": [{}]}, "messages.0.tool_calls.0.id", "is required"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "b", "arguments": {}}}]},
            "messages.0.tool_calls.0.function.arguments",
            "an object as a text of JSON",
        ),
        (
            {
                "role": "user",
                "content": "x",
                "tool_calls": [{"id": "a", "function": {"name": "b", "arguments": ""}}],
            },
            "messages.0.tool_calls",
            "an assistant's",
        ),
        ({"role": "user", "content": "x", "tool_call_id": "a"}, "messages.0.tool_call_id", "is a tool's"),
        ({"role": "tool", "content": None}, "messages.0.content", "a text"),
        ({"role": "user", "content": "x", "name": "bob"}, "messages.0.name", "not supported yet"),
    ],
)
async def test_bad_turns_about_tools_are_refused_by_name(
    tool_tokenizer: Tokenizer, message: dict[str, Any], param: str, expected: str
) -> None:
    async with serving(tool_tokenizer) as (client, _):
        error = (await chat(client, message, USER)).json()["error"]
    assert error["param"] == param
    assert expected in error["message"]


async def test_variables_of_the_template(tool_tokenizer: Tokenizer) -> None:
    async with serving(tool_tokenizer) as (client, engine):
        for values in (None, {"enable_thinking": True}, {"enable_thinking": False}):
            assert (await chat(client, chat_template_kwargs=values)).status_code == 200
        ends = [
            tool_tokenizer.decode(request.prompt_ids).rpartition("<assistant>")[2]
            for request in engine.requests
        ]
        assert ends == ["", "", "<quick>"]
        refused = await chat(client, task="e2e", chat_template_kwargs={"enable_thinking": False})
        assert refused.json()["error"]["param"] == "chat_template_kwargs"


async def test_a_generation_prompt_can_be_left_out(tool_tokenizer: Tokenizer) -> None:
    async with serving(tool_tokenizer) as (client, engine):
        assert (await chat(client, add_generation_prompt=False)).status_code == 200
        assert tool_tokenizer.decode(engine.requests[-1].prompt_ids) == "<user>the weather\n"
        refused = await chat(client, task="e2e", add_generation_prompt=False)
        assert refused.json()["error"]["param"] == "add_generation_prompt"


ANSWER = {"role": "assistant", "content": "So it"}


async def test_an_answer_goes_on(tool_tokenizer: Tokenizer, scripted: Callable[[str], Any]) -> None:
    """The plain model's turn is left open; a task's answer follows its prompt without the adapter."""
    async with serving(tool_tokenizer, " rains<|end|>") as (client, engine):
        for task in (None, "talk", "e2e"):
            body = {"task": task, "continue_final_message": True, "add_generation_prompt": False}
            answer = await chat(client, USER, ANSWER, **body)
            (choice,) = answer.json()["choices"]
            assert choice["message"]["content"] == " rains", "the space belongs to the text"
            request = engine.requests[-1]
            given = len(request.prompt_ids) + len(request.continuation_ids)
            assert answer.json()["usage"]["prompt_tokens"] == given
        plain, talk, e2e = engine.requests
    assert tool_tokenizer.decode(plain.prompt_ids) == "<user>the weather\n<assistant>So it"
    assert (plain.continuation_ids, talk.continuation_ids) == ((), e2e.continuation_ids)
    assert list(e2e.continuation_ids) == tool_tokenizer.encode_continuation(" So it")
    assert tool_tokenizer.decode(talk.prompt_ids) == "<user>Q: the weather\n<assistant>"
    assert tool_tokenizer.decode(e2e.prompt_ids) == "I the weather O:"


@pytest.mark.parametrize(
    ("messages", "body", "param", "message"),
    [
        ([USER], {}, "messages", "expected a text of the assistant's"),
        ([USER, {"role": "assistant", "content": ""}], {}, "messages", "expected a text of the assistant's"),
        ([ANSWER], {}, "messages", "needs the message that is answered"),
        ([USER, ANSWER], {"add_generation_prompt": True}, "add_generation_prompt", "send one of them"),
        ([USER, ANSWER], {"use_beam_search": True, "n": 2}, "continue_final_message", "use_beam_search"),
        ([USER, ANSWER, ANSWER], {}, "messages", "the last message must be"),
    ],
)
async def test_what_cannot_go_on_is_refused(
    tool_tokenizer: Tokenizer, messages: list[Any], body: dict[str, Any], param: str, message: str
) -> None:
    async with serving(tool_tokenizer) as (client, _):
        response = await chat(client, *messages, continue_final_message=True, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), response.text
    assert message in error["message"]


async def test_what_goes_on_shares_the_context(tool_tokenizer: Tokenizer) -> None:
    long = {"role": "assistant", "content": "x " * 1100}
    async with serving(tool_tokenizer) as (client, _):
        body = {"task": "e2e", "continue_final_message": True, "max_tokens": 1}
        error = (await chat(client, USER, long, **body)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "of the continuation" in error["message"]
