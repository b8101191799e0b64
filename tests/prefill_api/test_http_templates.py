"""What is put around a prompt: nothing is left out in silence, and the answer says what was."""

import asyncio
from typing import Any

import httpx
import pytest

from prad.lm import Tokenizer
from prefill_service.api import ApiLimits, ModelInfo, create_app

URL = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"messages": [{"role": "user", "content": "the food"}]}


async def test_ids_of_a_task_with_a_template_are_refused_with_the_ways_out(
    client: httpx.AsyncClient, engine: Any
) -> None:
    for task in ("e2e", "talk"):
        for prompt in ([5, 6, 7], [[5, 6], [7]]):
            response = await client.post(URL, json={"task": task, "prompt": prompt})
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (
                400,
                "template_not_applied",
                "prompt",
            )
            assert all(way in error["message"] for way in ("'add_template'", "'raw_prompt'", "as text"))
    assert not engine.requests


@pytest.mark.parametrize("task", ["e2e", "talk", "plain"])
async def test_a_template_around_ids_gives_the_ids_of_the_text(
    client: httpx.AsyncClient, engine: Any, tokenizer: Tokenizer, task: str
) -> None:
    body = {"task": task, "max_tokens": 1}
    ids = tokenizer.encode_continuation(" the food")
    answers = [
        await client.post(URL, json={**body, "prompt": ids, "add_template": True}),
        await client.post(URL, json={**body, "prompt": " the food"}),
    ]
    around, of_text = engine.requests
    assert around.prompt_ids == of_text.prompt_ids
    assert [answer.json()["prad"]["template"] for answer in answers] == ["task", "task"]
    assert len(of_text.prompt_ids) > len(ids) or task == "plain"


async def test_ids_that_the_text_would_not_have_in_the_template_are_refused(
    client: httpx.AsyncClient, engine: Any, tokenizer: Tokenizer
) -> None:
    """Behind the template's space a word begins with it; single letters are joined; an end token is none."""
    joined = tokenizer.encode_continuation("the food")
    alone = [token for letter in "the food" for token in tokenizer.encode_continuation(letter)]
    for ids in (joined, alone, [*tokenizer.encode_continuation(" the food"), tokenizer.eos_id]):
        response = await client.post(URL, json={"task": "e2e", "prompt": ids, "add_template": True})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "template_not_applicable")
    for ids in ([], [5] * 129):
        response = await client.post(URL, json={"task": "e2e", "prompt": ids, "add_template": True})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert not engine.requests


@pytest.mark.parametrize(
    ("path", "body", "template"),
    [
        (URL, {"task": "e2e", "prompt": "the food"}, "task"),
        (URL, {"task": "e2e", "prompt": "the food", "raw_prompt": True}, "none"),
        (URL, {"task": "e2e", "prompt": "the food", "add_template": False}, "none"),
        (URL, {"task": "e2e", "prompt": [5, 6], "raw_prompt": True}, "none"),
        (URL, {"task": "plain", "prompt": [5, 6]}, "none"),
        (URL, {"prompt": [5, 6], "add_template": True}, "none"),
        (URL, {"prompt": "the food"}, "none"),
        (CHAT, {"task": "e2e", **USER}, "task"),
        (CHAT, {"task": "e2e", "raw_prompt": True, **USER}, "none"),
        (CHAT, {"task": "talk", **USER}, "task"),
        (CHAT, {"task": "talk", "raw_prompt": True, **USER}, "chat"),
        (CHAT, USER, "chat"),
    ],
)
async def test_the_answer_says_what_is_around_the_prompt(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], template: str
) -> None:
    response = await client.post(path, json={"max_tokens": 1, **body})
    assert response.json()["prad"]["template"] == template


@pytest.mark.parametrize("flag", [False, True])
async def test_two_words_on_the_template_are_refused(client: httpx.AsyncClient, flag: bool) -> None:
    body = {"task": "e2e", "prompt": "x", "raw_prompt": flag, "add_template": flag}
    response = await client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "add_template")


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(
    client: httpx.AsyncClient, engine: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 128 * tokenizer.longest_token
    assert tokenizer.longest_token >= max(len(tokenizer.token_text(i)) for i in range(len(tokenizer)))

    def never(*_: object, **__: object) -> list[int]:
        raise AssertionError("is tokenised")

    monkeypatch.setattr(tokenizer, "encode_prompt", never)
    monkeypatch.setattr(tokenizer, "encode_chat", never)
    long, half = "x" * (most + 1), "x" * (most // 2 + 1)
    turns = [{"role": r, "content": half} for r in ("user", "assistant", "user")][1:]
    for path, body in (
        (URL, {"prompt": long}),
        (URL, {"prompt": ["x", long]}),
        (URL, {"prompt": long, "task": "talk"}),
        (CHAT, {"messages": turns}),
        (CHAT, {"messages": [{"role": "user", "content": long}], "task": "e2e"}),
    ):
        response = await client.post(path, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded"), response.text
        assert f"at most {most} characters" in error["message"]
    assert not engine.requests
    monkeypatch.undo()
    cut = {"prompt": long, "task": "e2e", "truncate_prompt_tokens": 9, "max_tokens": 1}
    assert (await client.post(URL, json=cut)).status_code == 200, "who asks for it gets what does fit"
    assert len(engine.requests[-1].prompt_ids) == 9

    ids = {**cut, "prompt": tokenizer.encode_prompt(" x" * 200), "add_template": True}
    assert len(ids["prompt"]) > 128
    assert (await client.post(URL, json=ids)).status_code == 200, "ids likewise"
    assert len(engine.requests[-1].prompt_ids) == 9


async def test_what_waits_for_being_tokenised_is_bounded(
    engine: Any, tokenizer: Tokenizer, language_model: Any, catalogue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests, not their prompts, are let in; short texts and a single request always are."""
    info = ModelInfo("0123456789abcdef", language_model.max_context, len(tokenizer), frozenset())
    limits = ApiLimits(thread_chars=50, tokenising_chars=150)
    app = create_app(engine, catalogue, tokenizer, info, limits)
    loop, started, go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    encode = tokenizer.encode_prompt

    def slow(text: str, *more: str | int, **options: bool) -> list[int]:
        if len(text) > limits.thread_chars:
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(20)
        return encode(text, *more, **options)

    monkeypatch.setattr(tokenizer, "encode_prompt", slow)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        def post(*lengths: int) -> Any:
            prompts = [("the food " * 99)[:length] for length in lengths]
            return client.post(URL, json={"prompt": prompts, "max_tokens": 1})

        first = asyncio.ensure_future(post(90, 90))
        await started.wait()
        refused = await post(60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert (await post(40)).status_code == 200
        go_on.set()
        assert (await first).status_code == 200
        assert (await post(60)).status_code == 200
