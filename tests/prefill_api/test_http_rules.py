"""Penalties, biases, bad words and structured output over HTTP: what they do to answers, what is refused."""

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prad.lm import CompiledRules, Tokenizer

PROMPT = "the food"
SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["good", "stars"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": SCHEMA}}


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    request = {"prompt": PROMPT, "model": "plain", "max_tokens": 100, "temperature": 0, **body}
    response = await client.post("/v1/completions", json=request)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def text(client: httpx.AsyncClient, **body: Any) -> str:
    (choice,) = (await complete(client, **body))["choices"]
    assert choice["finish_reason"] == ("length" if "max_tokens" in body else "stop")
    said: str = choice["text"]
    return said


async def refused(client: httpx.AsyncClient, **body: Any) -> tuple[str, str]:
    response = await client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("task", ["tiny/model", "plain"])
async def test_every_way_to_say_what_the_answer_is(client: httpx.AsyncClient, task: str) -> None:
    for said in (
        {"response_format": FORMAT},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": json.dumps(SCHEMA)},
    ):
        review = json.loads(await text(client, model=task, **said))
        assert list(review) == ["good", "stars"]
    for said in ({"structured_outputs": {"regex": "[a-c]{3}[0-9]"}}, {"guided_regex": "[a-c]{3}[0-9]"}):
        assert re.fullmatch("[a-c]{3}[0-9]", await text(client, model=task, **said))
    for said in ({"structured_outputs": {"choice": ["good", "bad"]}}, {"guided_choice": ["good", "bad"]}):
        assert await text(client, model=task, **said) in ("good", "bad")
    grammar = 'start: "x" "y"~2'
    for said in ({"structured_outputs": {"grammar": grammar}}, {"guided_grammar": grammar}):
        assert await text(client, model=task, **said) == "xyy"


async def test_any_json_object_is_one(client: httpx.AsyncClient) -> None:
    for said in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        answer = await complete(client, max_tokens=8, **said)
        assert answer["choices"][0]["text"].startswith("{")


async def test_all_choices_and_prompts_keep_to_it_in_a_stream_too(client: httpx.AsyncClient) -> None:
    body = {
        "prompt": ["the food", "Hello"],
        "n": 2,
        "temperature": 1.5,
        "seed": 2,
        "guided_choice": ["a b", "c"],
    }
    whole = await complete(client, **body)
    assert {choice["text"] for choice in whole["choices"]} <= {"a b", "c"}
    response = await client.post(
        "/v1/completions", json={"model": "plain", "max_tokens": 100, **body, "stream": True}
    )
    said = [""] * 4
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                said[choice["index"]] += choice["text"]
    assert said == [choice["text"] for choice in whole["choices"]]


async def test_nothing_is_asked_of_requests_that_say_nothing(client: httpx.AsyncClient, engine: Any) -> None:
    neutral = {"presence_penalty": 0, "logit_bias": {}, "bad_words": [], "response_format": {"type": "text"}}
    for body in ({}, neutral, {"repetition_penalty": 1.0, "stop_token_ids": [], "guided_json": None}):
        await complete(client, max_tokens=2, **body)
        assert engine.requests[-1].sampling.rules is None


async def test_what_is_said_of_tokens_is_done(
    client: httpx.AsyncClient, engine: Any, tokenizer: Tokenizer
) -> None:
    likely = {"70": 100}
    said = await text(client, logit_bias=likely, ignore_eos=True, max_tokens=3)
    assert said == 3 * tokenizer.token_text(70)
    assert await text(client, allowed_token_ids=[70], max_tokens=3) == said
    assert await text(client, logit_bias=likely, stop_token_ids=[70], ignore_eos=True) == ""
    said = await text(client, logit_bias=likely, frequency_penalty=2, ignore_eos=True, max_tokens=90)
    assert said.count(tokenizer.token_text(70)) in range(30, 70), "until it has cost as much"
    await complete(client, presence_penalty=1, frequency_penalty=-1, repetition_penalty=2, max_tokens=3)
    rules = engine.requests[-1].sampling.rules
    assert (rules.presence_penalty, rules.frequency_penalty, rules.repetition_penalty) == (1, -1, 2)
    assert not isinstance(rules, CompiledRules)


async def test_a_bad_word_is_not_said_with_a_space_or_without(
    client: httpx.AsyncClient, engine: Any, tokenizer: Tokenizer
) -> None:
    words, one = ["food", " the food"], tokenizer.token_text(70)
    drawn = {"logit_bias": {"70": 100}, "ignore_eos": True, "max_tokens": 6, "logprobs": 0}
    answer = await complete(client, bad_words=[*words, one], **drawn)
    assert one not in answer["choices"][0]["logprobs"]["tokens"]
    rules = engine.requests[-1].sampling.rules
    texts = ("food", " food", "the food", " the food", one, f" {one}")
    wanted = {tuple(tokenizer.encode_continuation(text)) for text in texts}
    assert {word.ids for word in rules.bad_words} == wanted


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"guided_regex": "(x"}, "guided_regex", "'guided_regex' cannot be kept to: "),
        (
            {"guided_json": {"properties": {"a": {"type": "string", "pattern": "(x"}}}},
            "guided_json.properties.a",
            "'guided_json.properties.a' cannot be kept to: ",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"format": "no-such"}}}},
            "response_format.json_schema.schema",
            "no-such",
        ),
        (
            {"guided_regex": "x", "response_format": FORMAT},
            "guided_regex",
            "'response_format' and 'guided_regex' both say what the answer is: send one of them",
        ),
        ({"guided_regex": "x", "ignore_eos": True}, "ignore_eos", "does not go together with 'ignore_eos'"),
        ({"guided_regex": "x", "allowed_token_ids": [5]}, "allowed_token_ids", "does not go together"),
        (
            {"guided_regex": "x", "use_beam_search": True, "n": 2},
            "guided_regex",
            "'use_beam_search' takes no 'guided_regex'",
        ),
        ({"presence_penalty": 1, "use_beam_search": True, "n": 2}, "presence_penalty", "takes no"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "token id 99999 is out of range: expected 0 to"),
        ({"stop_token_ids": [99999]}, "stop_token_ids", "token id 99999 is out of range"),
        ({"allowed_token_ids": [1, 99999]}, "allowed_token_ids", "token id 99999 is out of range"),
    ],
)
async def test_what_cannot_be_is_refused_by_its_path(
    client: httpx.AsyncClient, engine: Any, body: dict[str, Any], param: str, message: str
) -> None:
    field, told = await refused(client, **body)
    assert field == param
    assert message in told
    assert engine.requests == []


async def test_stop_ids_go_together_with_beams(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"use_beam_search": True, "n": 2, "stop_token_ids": [5], "max_tokens": 2, "temperature": 0}
    response = await client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert response.status_code == 200, response.text


async def test_the_fields_are_described(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest"):
        described = schemas[name]["properties"]
        for field in ("presence_penalty", "logit_bias", "bad_words", "response_format", "structured_outputs"):
            assert described[field]["description"], field


async def test_a_model_without_bytes_refuses_grammars_and_serves_the_rest(
    app_of: Callable[..., Any], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "written", lambda _: '{"version": "1.0"}')
    transport = httpx.ASGITransport(app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        param, message = await refused(client, guided_choice=["a"])
        assert (param, "no place for grammars" in message) == ("guided_choice", True)
        await complete(client, max_tokens=2, presence_penalty=1)
