"""Calls that the model has to make: its answer keeps to a grammar of them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from prad.lm import LanguageModel, Tokenizer
from prefill_service.api import ModelInfo, create_app
from tests.prefill_api.conftest import STARS, USER, ModelEngine, catalogue_of, record

TOOLS = [
    {"type": "function", "function": {"name": "stars", "parameters": STARS, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture
async def forcing(
    tool_tokenizer: Tokenizer, language_model: LanguageModel
) -> AsyncIterator[httpx.AsyncClient]:
    info = ModelInfo("0123456789abcdef", 1024, len(tool_tokenizer), frozenset())
    tasks = catalogue_of({"talk": record(template="{prompt}", chat_template=True)})
    app = create_app(ModelEngine(model=language_model), tasks, tool_tokenizer, info)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("task", [None, "talk"])
async def test_an_answer_is_a_call_if_it_has_to_be(forcing: httpx.AsyncClient, task: str | None) -> None:
    for choice, names in (("required", {"stars", "now"}), (NOW, {"now"})):
        for seed in range(2):
            body: dict[str, Any] = {"messages": [USER], "task": task, "tools": TOOLS, "tool_choice": choice}
            body |= {"parallel_tool_calls": False, "temperature": 1.0, "seed": seed, "max_tokens": 200}
            response = await forcing.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            (answer,) = response.json()["choices"]
            (call,) = answer["message"]["tool_calls"]
            assert (answer["message"]["content"], answer["finish_reason"]) == (None, "tool_calls")
            assert call["function"]["name"] in names
            arguments = json.loads(call["function"]["arguments"])
            assert arguments == {} if call["function"]["name"] == "now" else 1 <= arguments["n"] <= 9


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_what_does_not_go_together(
    forcing: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    sent = {"messages": [USER], "tools": TOOLS, **body}
    response = await forcing.post("/v1/chat/completions", json=sent)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Leaf"}, "again": {"$ref": "#"}},
    "required": ["root"],
    "additionalProperties": False,
    "$defs": {"Leaf": {"enum": ["oak", "$ref"]}},
}


async def test_schemas_refer_to_parts_of_themselves(forcing: httpx.AsyncClient) -> None:
    """Each tool's parameters to their own, whatever others are called."""
    other: dict[str, Any] = {
        "type": "object",
        "properties": {"n": {"$ref": "#/definitions/Leaf"}},
        "required": ["n"],
    }
    other |= {"definitions": {"Leaf": {"type": "boolean"}}, "additionalProperties": False}
    tools = [
        {"type": "function", "function": {"name": "tree", "parameters": TREE}},
        {"type": "function", "function": {"name": "other", "parameters": other}},
        {"type": "function", "function": {"name": "named", "parameters": {"$id": "http://a/b", **other}}},
    ]
    for name, offered in (("tree", tools), ("other", tools), ("named", tools), ("tree", tools[:1])):
        choice: Any = {"type": "function", "function": {"name": name}}
        if name == "tree":
            choice = "required"
        body: dict[str, Any] = {
            "messages": [USER],
            "tools": offered,
            "tool_choice": choice,
            "parallel_tool_calls": False,
        }
        answer = await forcing.post("/v1/chat/completions", json=body | {"seed": 1, "max_tokens": 300})
        assert answer.status_code == 200, answer.text
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "tree":
            assert arguments["root"] in ("oak", "$ref")
        else:
            assert isinstance(arguments["n"], bool)


@pytest.mark.parametrize("task", [None, "talk"])
async def test_a_model_that_may_call_does_or_keeps_to_the_format(
    forcing: httpx.AsyncClient, tool_tokenizer: Tokenizer, task: str | None
) -> None:
    """Both are open to it, whichever it is led to; and nothing else."""
    form = {"type": "json_schema", "json_schema": {"name": "stars", "schema": STARS}}
    (call_id,) = tool_tokenizer.encode_continuation("<")[-1:]
    (schema_id,) = tool_tokenizer.encode_continuation("{")[-1:]
    tools = [{"type": "function", "function": {"name": "now"}}]
    for led_to, calls in ((call_id, True), (schema_id, False)):
        body: dict[str, Any] = {
            "messages": [USER],
            "task": task,
            "tools": tools,
            "response_format": form,
            "seed": 1,
        }
        body |= {"logit_bias": {str(led_to): 100}, "max_tokens": 200, "temperature": 1.0}
        body["parallel_tool_calls"] = False
        answer = await forcing.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        message = answer.json()["choices"][0]["message"]
        if calls:
            assert [call["function"]["name"] for call in message["tool_calls"]] == ["now"]
        else:
            assert 1 <= json.loads(message["content"])["n"] <= 9
