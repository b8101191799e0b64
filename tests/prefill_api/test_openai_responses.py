"""OpenAI's own client on /v1/responses, and its files and batches: a real server on a loopback port."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from prefill_service.api import ApiLimits, ModelInfo, create_app
from prefill_service.batches import Batches, BatchLimits, FileLimits
from prefill_service.catalogue import KeyRing
from prefill_service.errors import DecodeUnavailableError, NotFoundError
from prefill_service.protocols.responses.kept import KeptResponses
from tests.prefill_api.serving import listening

URL = "/v1/responses"
SEED = {"seed": 1, "ignore_eos": True}


@pytest.fixture
async def official(
    engine: Any, tokenizer: Any, language_model: Any, catalogue: Any, tmp_path: Path
) -> AsyncIterator[openai.AsyncOpenAI]:
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())
    batches = Batches(tmp_path, FileLimits(), BatchLimits(), KeyRing())
    app = create_app(engine, catalogue, tokenizer, info, ApiLimits(chat_tokens=12), batches=batches)
    running = asyncio.create_task(batches.run(app))
    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_response_is_the_chat_s_answer(official: openai.AsyncOpenAI) -> None:
    response = await official.responses.create(
        model="talk@1",
        input="hello",
        instructions="You are terse.",
        max_output_tokens=6,
        metadata={"for": "me"},
        extra_body=SEED,
    )
    turns: Any = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "hello"}]
    same = await official.chat.completions.create(
        model="talk@1", messages=turns, max_tokens=6, extra_body=SEED
    )
    assert same.usage is not None
    assert response.usage is not None
    assert response.output_text == same.choices[0].message.content
    assert (response.status, response.metadata) == ("incomplete", {"for": "me"})
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        same.usage.prompt_tokens,
        same.usage.completion_tokens,
    )
    assert response.model_extra is not None
    assert response.model_extra["prad"]["version"] == 1


async def test_a_stream_ends_as_the_response_that_it_is(official: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": "talk", "input": "hello", "max_output_tokens": 6, "extra_body": SEED}
    whole = await official.responses.create(**asked)
    stream = await official.responses.create(**asked, stream=True)
    events: Any = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(e.delta for e in events if e.type.endswith("delta")) == whole.output_text
    last = events[-1].response
    assert (last.output_text, last.usage, last.status) == (whole.output_text, whole.usage, whole.status)
    assert (await official.responses.retrieve(last.id)).output == last.output


async def test_a_conversation_goes_on_from_what_is_kept(official: openai.AsyncOpenAI) -> None:
    first = await official.responses.create(model="talk", input="hello", max_output_tokens=3, extra_body=SEED)
    second = await official.responses.create(
        model="talk", input="one two", previous_response_id=first.id, max_output_tokens=3, extra_body=SEED
    )
    turns: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "one two"},
    ]
    same = await official.chat.completions.create(model="talk", messages=turns, max_tokens=3, extra_body=SEED)
    assert second.output_text == same.choices[0].message.content
    items: Any = [turns[0], first.output[0].model_dump(), turns[2]]
    again = await official.responses.create(
        model="talk", input=items, max_output_tokens=3, store=False, extra_body=SEED
    )
    assert again.output_text == second.output_text
    for name in (again.id, "resp_none"):
        with pytest.raises(openai.NotFoundError) as gone:
            await official.responses.create(model="talk", input="x", previous_response_id=name)
        assert gone.value.param == "previous_response_id"
    await official.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await official.responses.retrieve(first.id)


async def test_a_stream_that_breaks_says_so(official: openai.AsyncOpenAI, engine: Any) -> None:
    engine.error, engine.fail_at = DecodeUnavailableError("gone"), 6
    stream = await official.responses.create(model="talk", input="hello", stream=True, extra_body=SEED)
    events: Any = [event async for event in stream]
    assert (events[-1].type, events[-1].response.error.message) == ("response.failed", "gone")


@pytest.mark.parametrize(
    ("wrong", "param", "words"),
    [
        ({"input": None}, "input", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0",
            "input_image",
        ),
        ({"input": [{"type": "reasoning"}]}, "input.0", "reasoning"),
        ({"background": True}, "background", "not supported yet"),
        ({"messages": []}, "messages", "unknown field"),
        ({"nonsense": 1}, "nonsense", "unknown field"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than"),
        (
            {"tool_choice": {"type": "web_search"}, "tools": [{"type": "function", "name": "f"}]},
            "tool_choice",
            "auto",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
    ],
)
async def test_what_is_wrong_is_named_as_it_was_sent(
    client: httpx.AsyncClient, wrong: dict[str, Any], param: str, words: str
) -> None:
    body = {k: v for k, v in ({"model": "talk", "input": "hello"} | wrong).items() if v is not None}
    refused = await client.post(URL, json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_the_least_recently_used_leave_when_there_is_no_room() -> None:
    kept = KeptResponses(3000)
    for name in ("a", "b", "c"):
        kept.keep(None, {"id": name, "text": "x" * 500}, [])
        kept.find("a", None, "id")
    kept.find("a", None, "id")
    with pytest.raises(NotFoundError):
        kept.find("b", None, "id")
    with pytest.raises(NotFoundError):
        kept.find("c", "alice", "id")
    kept.keep(None, {"id": "large", "text": "x" * 5000}, [])
    with pytest.raises(NotFoundError):
        kept.find("large", None, "id")
    kept.delete("a", None)
    assert not KeptResponses(0).keeps


def test_a_key_that_keeps_many_evicts_its_own() -> None:
    kept = KeptResponses(3000)
    kept.keep("alice", {"id": "a", "text": "x" * 500}, [])
    for number in range(9):
        kept.keep("bob", {"id": f"b{number}", "text": "x" * 500}, [])
    assert kept.find("a", "alice", "id").response["id"] == "a"
    assert kept.find("b8", "bob", "id").response["id"] == "b8"
    for name in ("b0", "b6", "a"):
        with pytest.raises(NotFoundError):
            kept.find(name, "bob", "id")
    kept.delete("a", "alice")
    with pytest.raises(NotFoundError):
        kept.find("a", "alice", "id")


async def test_files_and_batches_of_every_endpoint(official: openai.AsyncOpenAI) -> None:
    bodies: dict[Any, dict[str, Any]] = {
        "/v1/completions": {"model": "e2e", "prompt": "food", "max_tokens": 3},
        "/v1/chat/completions": {
            "model": "talk",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": 3,
        },
        "/v1/responses": {"model": "talk", "input": "hello", "max_output_tokens": 3},
    }
    for endpoint, body in bodies.items():
        lines = [
            {"custom_id": f"r{number}", "method": "POST", "url": endpoint, "body": body | {"seed": number}}
            for number in range(3)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        sent = await official.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await official.batches.create(
            input_file_id=sent.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
        )
        while batch.status != "completed":
            await asyncio.sleep(0.005)
            batch = await official.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 3
        assert batch.output_file_id is not None
        answered = (await official.files.content(batch.output_file_id)).text.splitlines()
        assert sorted(json.loads(line)["custom_id"] for line in answered) == ["r0", "r1", "r2"]
    last = json.loads(answered[0])["response"]["body"]
    assert last["store"] is False, "it would evict what live conversations go on from"
    with pytest.raises(openai.NotFoundError):
        await official.responses.retrieve(last["id"])
    assert len([batch async for batch in official.batches.list(limit=2)]) == 3
    assert len([file async for file in official.files.list()]) == 6
    await official.files.delete(sent.id)
