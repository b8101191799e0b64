"""/tokenize and /detokenize, and what an answer says of its tokens."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prad.lm import Tokenizer
from prefill_service.api import ApiLimits, ModelInfo, create_app
from tests.prefill_api.conftest import EOS, catalogue_of, record

USER = {"role": "user", "content": "the food"}
ANSWER = {"role": "assistant", "content": "is good"}


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize("task", ["e2e", "e2e@1", "talk", "virtual", None])
async def test_ids_are_those_that_a_request_computes(
    client: httpx.AsyncClient, engine: Any, task: str | None
) -> None:
    system = {"role": "system", "content": "one"}
    chats: list[dict[str, Any]] = [
        {"messages": [USER]},
        {"messages": [system, USER]},
        {"messages": [USER, ANSWER], "continue_final_message": True},
        {"messages": [USER], "raw_prompt": True},
    ]
    for path, bodies in (
        ("/v1/completions", [{"prompt": "the food"}, {"prompt": "the food", "raw_prompt": True}]),
        ("/v1/chat/completions", chats),
    ):
        for body in bodies:
            answer = await post(client, path, task=task, max_tokens=1, **body)
            request = engine.requests[-1]
            found = await post(client, "/tokenize", task=task, **body)
            assert tuple(found["tokens"]) == request.prompt_ids + request.continuation_ids
            assert (found["count"], found["token_strs"]) == (len(found["tokens"]), None)
            assert found["max_model_len"] == (108 if task == "virtual" else 128)
            assert found["prad"] == {
                name: answer["prad"][name] for name in ("task", "version", "digest", "routing", "template")
            }


async def test_ids_become_text_again(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    found = await post(client, "/tokenize", model="tiny/model", prompt="the food ünï", return_token_strs=True)
    assert found["token_strs"] == tokenizer.names(found["tokens"])
    told = await post(client, "/detokenize", tokens=[*found["tokens"], tokenizer.eos_id])
    assert told == {"prompt": f"the food ünï{EOS}"}
    assert await post(client, "/detokenize", tokens=[]) == {"prompt": ""}
    long = await post(client, "/tokenize", prompt="the food " * 400, task="e2e")
    assert long["count"] > long["max_model_len"], "nothing too long is refused"
    assert "the food the food" in (await post(client, "/detokenize", tokens=long["tokens"]))["prompt"]


async def test_task_tokens_have_their_names(tokenizer: Tokenizer, scripted: Callable[[str], Any]) -> None:
    named = record(template="<|a|>{prompt}<|b|>", task_tokens=("<|a|>", "<|b|>"))
    info = ModelInfo("0123456789abcdef", 128, len(tokenizer), frozenset())
    app = create_app(scripted("x"), catalogue_of({"tt": named}), tokenizer, info, ApiLimits())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        found = await post(client, "/tokenize", task="tt", prompt="food", return_token_strs=True)
        assert (found["tokens"][0], found["tokens"][-1]) == (-1, -2)
        assert (found["token_strs"][0], found["token_strs"][-1]) == ("<|a|>", "<|b|>")


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("/tokenize", {}, 400, "prompt", "is required"),
        ("/tokenize", {"prompt": "x", "messages": [USER]}, 400, "prompt", "send one of them"),
        ("/tokenize", {"prompt": ["x"]}, 400, "prompt", "valid string"),
        ("/tokenize", {"prompt": ""}, 400, "prompt", "empty"),
        ("/tokenize", {"prompt": "x", "foo": 1}, 400, "foo", "unknown field"),
        ("/tokenize", {"prompt": "x", "task": "nope"}, 404, "task", "nope"),
        ("/tokenize", {"messages": [USER], "temperature": 1}, 400, "temperature", "unknown field"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, 400, "chat_template", "not supported"),
        ("/tokenize", {"messages": [USER, ANSWER]}, 400, "messages", "the last message"),
        ("/detokenize", {"tokens": [5, 10**6]}, 400, "tokens", "token id 1000000 is out of range"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens", "token id -1"),
        ("/detokenize", {"tokens": ["a", "b"]}, 400, "tokens.0", "valid integer"),
        ("/detokenize", {"tokens": [], "task": "nope"}, 404, "task", "nope"),
    ],
)
async def test_refusals_name_the_field(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert message in error["message"]


async def test_special_tokens_in_front_can_be_chosen(
    client: httpx.AsyncClient, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    encode = tokenizer._ids

    def noting(text: str, *, add_special_tokens: bool) -> list[int]:
        asked.append(add_special_tokens)
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "_ids", noting)
    for body, expected in (
        ({"prompt": "x"}, (True, True, False)),
        ({"prompt": "x", "task": "e2e"}, (True, True, False)),
        ({"prompt": "x", "task": "talk"}, (False, True, False)),
        ({"messages": [USER]}, (False, True, False)),
        ({"messages": [USER], "task": "e2e"}, (True, True, False)),
    ):
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        for add, is_added in zip((None, True, False), expected, strict=True):
            for asks in (path, "/tokenize"):
                more = {"max_tokens": 1} if asks == path else {}
                await post(client, asks, **body, **more, add_special_tokens=add)
                assert asked.pop() is is_added, (asks, body, add)


def choices(response: httpx.Response) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    *lines, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    found = [json.loads(line.removeprefix("data: ")) for line in lines]
    return found, [choice for chunk in found for choice in chunk["choices"]]


async def test_an_answer_names_its_tokens_where_vllm_does(client: httpx.AsyncClient, engine: Any) -> None:
    body = {"task": "e2e", "max_tokens": 5, "return_token_ids": True, "n": 2, "ignore_eos": True, "stop": []}
    prompts = {"prompt": ["the food", "one two"], **body}
    whole = await post(client, "/v1/completions", **prompts)
    computed = sorted(engine.requests[-2:], key=lambda request: request.prompt_index)
    for choice in whole["choices"]:
        assert tuple(choice["prompt_token_ids"]) == computed[choice["index"] // 2].prompt_ids
        assert len(choice["token_ids"]) == 5
    streamed = await client.post("/v1/completions", json={**prompts, "stream": True})
    _, pieces = choices(streamed)
    for choice in whole["choices"]:
        first, *rest = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert first["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in piece for piece in rest)
        assert [token for piece in (first, *rest) for token in piece["token_ids"]] == choice["token_ids"]

    asked = {"messages": [USER], **body}
    whole = await post(client, "/v1/chat/completions", **asked)
    assert tuple(whole["prompt_token_ids"]) == engine.requests[-1].prompt_ids
    found, pieces = choices(await client.post("/v1/chat/completions", json={**asked, "stream": True}))
    assert found[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in found[1:])
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert [token for piece in mine for token in piece.get("token_ids", [])] == choice["token_ids"]
    plain = await post(client, "/v1/chat/completions", messages=[USER], max_tokens=1)
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_ends_an_answer_stays_in_it_if_asked(
    app_of: Any, scripted: Callable[[str], Any], tokenizer: Tokenizer, stream: bool
) -> None:
    transport = httpx.ASGITransport(app_of(scripted(f"the food END of it {EOS}")))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for body, text in (
            ({"stop": "END"}, "the food "),
            ({"stop": "END", "include_stop_str_in_output": True}, "the food END"),
            ({}, "the food END of it "),
            ({"skip_special_tokens": False}, "the food END of it "),
            ({"include_stop_str_in_output": True}, "the food END of it "),
            (
                {"include_stop_str_in_output": True, "skip_special_tokens": False},
                f"the food END of it {EOS}",
            ),
        ):
            sent = {"prompt": "x", "max_tokens": 50, "spaces_between_special_tokens": False, **body}
            response = await client.post("/v1/completions", json={**sent, "stream": stream})
            told = choices(response)[1] if stream else response.json()["choices"]
            assert "".join(choice["text"] for choice in told) == text, body
            assert told[-1]["finish_reason"] == "stop"
        goes_on = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "skip_special_tokens": False}
        answer = (await client.post("/v1/completions", json=goes_on)).json()["choices"][0]["text"]
        assert answer.startswith(f"the food END of it {EOS}{EOS}")


async def test_nobody_takes_them_for_answers(client: httpx.AsyncClient) -> None:
    await post(client, "/tokenize", task="e2e", prompt="x")
    metrics = (await client.get("/metrics")).text
    assert 'prad_http_requests_total{route="/tokenize",status="200",task="",version=""} 1.0' in metrics
    assert "prad_prompt_tokens_total{" not in metrics
