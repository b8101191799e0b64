"""/v1/completions over HTTP: real tokenizer, real small model, one engine call per prompt."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from adapter_registry.routing import Routing, drawn
from prad.lm import Tokenizer
from prefill_service.catalogue import TaskCatalogue, TaskVersions

PROMPT = "the food"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The stream's chunks; its form is checked on the way."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: {") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def test_an_answer_carries_everything(client: httpx.AsyncClient, engine: Any) -> None:
    response = await client.post(
        "/v1/completions",
        json={"prompt": PROMPT, "task": "e2e", "seed": 3, "max_tokens": 5, "stop": "zzz", "ignore_eos": True},
        headers={"x-request-id": "mine-1"},
    )
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert (body["model"], body["system_fingerprint"]) == ("e2e", "fp_0123456789ab")
    assert body["prad"] == {
        "task": "e2e",
        "version": 2,
        "digest": "e2e-2-digest",
        "routing": 41,
        "template": "task",
        "seed": 3,
        "sampling": {
            "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 5, "stop": ["zzz"]
        },
    }  # fmt: skip
    (request,) = engine.requests
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": 5,
        "total_tokens": len(request.prompt_ids) + 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert response.headers["x-request-id"] == "mine-1"
    assert {k: v for k, v in response.headers.items() if k.startswith("x-prad")} == {
        "x-prad-task": "e2e",
        "x-prad-version": "2",
        "x-prad-digest": "e2e-2-digest",
        "x-prad-routing": "41",
    }


async def test_prompt_ids_are_those_of_training(
    client: httpx.AsyncClient, engine: Any, tokenizer: Tokenizer
) -> None:
    await complete(client, task="e2e")
    await complete(client, task="e2e", raw_prompt=True)
    await complete(client, model="tiny/model")
    await complete(client, task="talk")
    await complete(client, task="e2e", prompt=[5, 6, 7], raw_prompt=True)
    await complete(client, task="plain", prompt=[5, 6, 7])
    expected = [
        tokenizer.encode_prompt(f"#INPUT: {PROMPT} #OUTPUT:"),
        tokenizer.encode_prompt(PROMPT),
        tokenizer.encode_prompt(PROMPT),
        tokenizer.encode_chat([{"role": "user", "content": f"Q: {PROMPT}"}]),
        [5, 6, 7],
        [5, 6, 7],
    ]
    assert [list(request.prompt_ids) for request in engine.requests] == expected


@pytest.mark.parametrize("scored", [None, 3])
async def test_a_stream_says_what_the_whole_answer_says(
    client: httpx.AsyncClient, scored: int | None
) -> None:
    body = {
        "prompt": [PROMPT, "hello world"],
        "n": 2,
        "seed": 11,
        "max_tokens": 9,
        "logprobs": scored,
        "ignore_eos": True,
    }
    whole = (await client.post("/v1/completions", json=body)).json()
    streamed = await client.post(
        "/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    *chunks, last = events(streamed)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)
    assert [("prad" in chunk) for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert chunks[0]["prad"] == whole["prad"]
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    for choice in whole["choices"]:
        news = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in news) == choice["text"]
        assert [c["finish_reason"] for c in news] == [None] * (len(news) - 1) + [choice["finish_reason"]]
        if scored is None:
            assert choice["logprobs"] is None
            continue
        for key, values in choice["logprobs"].items():
            assert [v for c in news for v in c["logprobs"][key]] == values
            assert len(values) == 9


async def test_choices_are_numbered_by_prompt_and_drawn_apart(client: httpx.AsyncClient, engine: Any) -> None:
    body = await complete(client, prompt=[PROMPT, PROMPT], n=3, seed=1, max_tokens=8, ignore_eos=True)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert len({choice["text"] for choice in body["choices"]}) > 1
    assert len({request.request_id for request in engine.requests}) == 2
    assert body["usage"]["completion_tokens"] == 48
    again = await complete(client, prompt=[PROMPT, PROMPT], n=3, seed=1, max_tokens=8, ignore_eos=True)
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in body["choices"]]


async def test_logprobs_have_the_legacy_form(client: httpx.AsyncClient) -> None:
    logprobs = (await complete(client, max_tokens=6, temperature=0, logprobs=2, ignore_eos=True))["choices"][
        0
    ]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {6}
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert 1 <= len(top) <= 2
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


async def test_task_output_loses_the_training_space_only(app_of: Any, scripted: Callable[[str], Any]) -> None:
    transport = httpx.ASGITransport(app_of(scripted("  two spaces")))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await complete(client, task="plain"))["choices"][0]["text"] == " two spaces"
        assert (await complete(client))["choices"][0]["text"] == "  two spaces"


async def test_a_stop_text_cuts_and_cancels(app_of: Any, scripted: Callable[[str], Any]) -> None:
    engine = scripted("one two END three four five")
    transport = httpx.ASGITransport(app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = await complete(client, stop=["END"], max_tokens=40, n=2)
        assert [c["text"] for c in body["choices"]] == ["one two ", "one two "]
        assert {c["finish_reason"] for c in body["choices"]} == {"stop"}
        assert body["usage"]["completion_tokens"] < 2 * len(engine.script)
        assert {choice for _, choice in engine.cancelled} == {0, 1}
        assert not engine.open
        streamed = await client.post(
            "/v1/completions", json={"prompt": "x", "stop": ["END"], "max_tokens": 40, "stream": True}
        )
        chunks = events(streamed)
        assert "".join(c["choices"][0]["text"] for c in chunks) == "one two "
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_end_token_counts_and_has_no_text(app_of: Any, scripted: Callable[[str], Any]) -> None:
    engine = scripted("one two")
    transport = httpx.ASGITransport(app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        body = await complete(client)
        assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("one two", "stop")
        assert body["usage"]["completion_tokens"] == len(engine.script) + 1
        endless = await complete(client, ignore_eos=True, max_tokens=20)
        assert (endless["choices"][0]["finish_reason"], endless["usage"]["completion_tokens"]) == (
            "length",
            20,
        )


async def test_virtual_tokens_take_context(client: httpx.AsyncClient) -> None:
    assert (
        await client.post("/v1/completions", json={"prompt": [5] * 100, "max_tokens": 28})
    ).status_code == 200
    refused = await client.post(
        "/v1/completions", json={"prompt": [5] * 100, "max_tokens": 28, "task": "virtual"}
    )
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "holds 108 tokens beside the adapter's 20 virtual ones" in refused.json()["error"]["message"]


async def test_truncation_keeps_the_end(client: httpx.AsyncClient, engine: Any) -> None:
    await complete(client, prompt=list(range(1, 200)), truncate_prompt_tokens=4, max_tokens=2)
    assert engine.requests[-1].prompt_ids == (196, 197, 198, 199)
    await complete(client, prompt=list(range(1, 200)), truncate_prompt_tokens=-1, max_tokens=2)
    assert engine.requests[-1].prompt_ids == tuple(range(74, 200))


@pytest.mark.parametrize(
    ("body", "version", "name"),
    [
        ({"task": "e2e"}, 2, "e2e"),
        ({"model": "e2e"}, 2, "e2e"),
        ({"model": "e2e@1"}, 1, "e2e@1"),
        ({"model": "e2e@canary"}, 1, "e2e@canary"),
        ({"task": "e2e@previous"}, 1, "e2e@previous"),
        ({"model": "tiny/model", "task": "e2e@1"}, 1, "e2e@1"),
        ({"model": "e2e", "task": "e2e@1"}, 1, "e2e@1"),
        ({"model": "tiny/model"}, None, "tiny/model"),
        ({}, None, "tiny/model"),
    ],
)
async def test_tasks_are_named_in_two_ways(
    client: httpx.AsyncClient, body: dict[str, str], version: int | None, name: str
) -> None:
    answer = await complete(client, **body)
    assert (answer["prad"]["version"], answer["model"]) == (version, name)


async def test_a_split_is_drawn_by_user_then_header_then_request(
    client: httpx.AsyncClient, catalogue: TaskCatalogue
) -> None:
    (entry,) = (entry for entry in catalogue.tasks() if entry.name == "e2e")
    split = {1: 50, 2: 50}
    routed = TaskVersions.of(Routing(revision=42, split=split), entry.routed.versions)
    before = {each.name: each.routed for each in catalogue.tasks()}
    catalogue.replace(before | {"e2e": routed})
    try:
        for key in map(str, range(12)):
            body = {"prompt": "a", "task": "e2e", "max_tokens": 1}
            for more, headers in (
                ({"user": key}, {}),
                ({"user": key}, {"x-prad-sticky-key": "another"}),
                ({"user": ""}, {"x-prad-sticky-key": key}),
                ({}, {"x-request-id": key}),
            ):
                told = await client.post("/v1/completions", json=body | more, headers=headers)
                answer = told.json()["prad"]
                assert (answer["version"], answer["routing"]) == (drawn("e2e", split, key), 42)
        models = (await client.get("/v1/models/e2e")).json()["prad"]
        assert (models["version"], models["split"], models["routing"]) == (1, {"1": 50, "2": 50}, 42)
    finally:
        catalogue.replace(before)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "plain", "task": "e2e"}, 400, "task"),
        ({"model": "e2e@1", "task": "e2e@2"}, 400, "task"),
        ({"task": "e2e@X"}, 400, "task"),
        ({"task": "e2e@x"}, 404, "task"),
        ({"task": "e2e@latest"}, 404, "task"),
        ({"task": "e2e", "user": 5}, 400, "user"),
        ({"task": "e2e@0"}, 400, "task"),
        ({"task": "nope"}, 404, "task"),
        ({"model": "gpt-4"}, 404, "model"),
        ({"model": "e2e@9"}, 404, "model"),
    ],
)
async def test_wrong_names_are_told(
    client: httpx.AsyncClient, body: dict[str, str], status: int, param: str
) -> None:
    response = await client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize(
    ("body", "each"),
    [
        ({}, 16),
        ({"n": 2, "logprobs": 1}, 16),
        ({"stream": True}, 1),
        ({"stop": ["END"]}, 1),
        ({"task": "e2e"}, 1),  # its artefact brings a stop text
        ({"task": "e2e", "stop": []}, 16),
    ],
)
async def test_tokens_are_told_one_by_one_where_somebody_looks_at_each(
    client: httpx.AsyncClient, engine: Any, body: dict[str, Any], each: int
) -> None:
    answer = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, **body})
    assert answer.status_code == 200
    (request,) = engine.requests
    assert request.tokens_per_event == each


async def test_prompts_that_came_together_are_known_to_be_of_one_answer(
    client: httpx.AsyncClient, engine: Any
) -> None:
    body = await complete(client, prompt=[PROMPT, PROMPT], max_tokens=2)
    assert [(request.answer, request.prompts) for request in engine.requests] == [(body["id"], 2)] * 2


async def test_a_salt_goes_to_the_engine_with_a_search_too(client: httpx.AsyncClient, engine: Any) -> None:
    await complete(client, max_tokens=2, cache_salt="mine")
    await complete(client, max_tokens=2, cache_salt="mine", use_beam_search=True, n=2)
    assert len(engine.requests) == 2
    assert {request.cache_salt for request in engine.requests} == {"mine"}
    await complete(client, max_tokens=2)
    assert engine.requests[-1].cache_salt is None


async def test_usage_can_come_with_every_chunk(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 4, "logprobs": 0, "ignore_eos": True, "stream": True}
    *chunks, last = events(await client.post("/v1/completions", json={**body, "stream_options": options}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
    assert last["usage"] == chunks[-1]["usage"]
    unasked = {**body, "stream_options": {"continuous_usage_stats": True}}
    assert all("usage" not in c for c in events(await client.post("/v1/completions", json=unasked)))
