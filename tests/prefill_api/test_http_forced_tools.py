"""Calls that the model has to make: its answer keeps to a grammar of them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from prad.lm import LanguageModel, Tokenizer
from prefill_service.api import ModelInfo, create_app
from tests.prefill_api.conftest import ModelEngine, catalogue_of, record

USER = {"role": "user", "content": "hi"}
STARS = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
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
            body = {"messages": [USER], "task": task, "tools": TOOLS, "tool_choice": choice}
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
        ({}, "tools"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "guided_grammar"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_what_does_not_go_together(
    forcing: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    sent = {"messages": [USER], "tools": TOOLS, **body}
    response = await forcing.post("/v1/chat/completions", json=sent)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
