"""Beam search over HTTP: the hypotheses that `prad eval --beams` finds, as choices of an ordinary answer."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from prad.core.search import Beams, BeamSearch, Limits
from prad.lm import LanguageModel, Tokenizer
from prad.training.decoding import AdaptedModel
from prad.training.evaluate import decoder
from prefill_service.errors import OverloadedError
from tests.prefill_api.conftest import ModelEngine
from tests.prefill_api.test_http_completions import events

URL, PROMPT, LENGTH = "/v1/completions", "the restaurant by the river", 9


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"task": "plain", "prompt": PROMPT, "max_tokens": LENGTH, "use_beam_search": True, **fields}
    return await client.post(URL, json=body)


async def texts(client: httpx.AsyncClient, **fields: Any) -> list[str]:
    response = await ask(client, **fields)
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


@pytest.fixture
def hypotheses(language_model: LanguageModel, tokenizer: Tokenizer) -> Callable[[int], list[list[int]]]:
    """The best ones of a search in this process; stop ids included."""

    def found(width: int) -> list[list[int]]:
        limits = Limits(LENGTH, frozenset({tokenizer.eos_id}))
        decoding = decoder(AdaptedModel(language_model), limits, beams=Beams(width))
        ((_, search),) = decoding.run([tokenizer.encode_prompt(PROMPT)])
        assert isinstance(search, BeamSearch)
        return [list(tokens) for tokens in search.hypotheses]

    return found


@pytest.mark.parametrize("width", [2, 3])
async def test_choices_are_the_best_hypotheses(
    width: int,
    client: httpx.AsyncClient,
    engine: ModelEngine,
    hypotheses: Callable[[int], list[list[int]]],
    tokenizer: Tokenizer,
) -> None:
    expected = hypotheses(width)
    whole = (await ask(client, n=width)).json()
    found = [choice["text"] for choice in whole["choices"]]
    assert found == [tokenizer.decode(tokens).removeprefix(" ") for tokens in expected]
    assert len(set(found)) == width
    assert whole["usage"]["completion_tokens"] == sum(map(len, expected))
    assert {c["finish_reason"] for c in whole["choices"]} == {"length"}
    assert whole["prad"]["sampling"]["beams"] == width
    assert [request.beams for request in engine.requests] == [Beams(width)]
    assert await texts(client, best_of=width) == found[:1]
    plain = await client.post(URL, json={"task": "plain", "prompt": PROMPT, "max_tokens": LENGTH})
    assert "beams" not in plain.json()["prad"]["sampling"]


async def test_a_stream_and_several_prompts_say_the_same(client: httpx.AsyncClient) -> None:
    (one,), (other,) = [await texts(client, prompt=p, best_of=3) for p in (PROMPT, "Hello world")]
    assert await texts(client, prompt=[PROMPT, "Hello world"], best_of=3) == [one, other]
    chunks = events(await ask(client, best_of=3, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == one


async def test_a_chat_has_beams_too(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": LENGTH, "use_beam_search": True}
    answers = [
        (await client.post("/v1/chat/completions", json={**body, **more})).json()
        for more in ({"best_of": 3}, {"n": 3})
    ]
    (best,), three = ([c["message"]["content"] for c in answer["choices"]] for answer in answers)
    assert best == three[0]
    assert len(set(three)) == 3


async def test_a_hypothesis_that_ends_has_no_text_of_its_end(
    client: httpx.AsyncClient, engine: ModelEngine, tokenizer: Tokenizer
) -> None:
    """The end token is the likeliest everywhere: the best hypothesis is that alone."""
    engine.likeliest = tokenizer.eos_id
    answer = (await ask(client, n=2)).json()
    best, other = answer["choices"]
    assert (best["text"], best["finish_reason"]) == ("", "stop")
    assert (other["text"] != "", other["finish_reason"]) == (True, "stop")
    assert answer["usage"]["completion_tokens"] == 3


async def test_a_stop_text_cuts_the_best(client: httpx.AsyncClient, engine: ModelEngine) -> None:
    (best,) = await texts(client, best_of=2)
    cut = (await ask(client, best_of=2, stop=best[3:5])).json()
    assert cut["choices"][0]["text"] == best[: best.index(best[3:5])]
    assert cut["choices"][0]["finish_reason"] == "stop"


async def test_the_tasks_own_temperature_is_for_drawing(client: httpx.AsyncClient) -> None:
    sampling = (await ask(client, task="e2e", best_of=2)).json()["prad"]["sampling"]
    assert (sampling["temperature"], sampling["beams"]) == (0.0, 2)


async def test_how_it_searches_is_passed_on_and_reported(
    client: httpx.AsyncClient, engine: ModelEngine
) -> None:
    asked = [{}, {"length_penalty": 0.6, "early_stopping": True}, {"early_stopping": "never"}]
    answers = [(await ask(client, best_of=2, **fields)).json() for fields in asked]
    assert [request.beams for request in engine.requests] == [
        Beams(2),
        Beams(2, 0.6, True),
        Beams(2, 1.0, None),
    ]
    told = [answer["prad"]["sampling"] for answer in answers]
    assert [(each["length_penalty"], each["early_stopping"]) for each in told] == [
        (1.0, False),
        (0.6, True),
        (1.0, "never"),
    ]


async def test_a_length_penalty_may_make_another_answer_the_best(
    client: httpx.AsyncClient, engine: ModelEngine, tokenizer: Tokenizer
) -> None:
    """The end token is the likeliest everywhere; but long answers are worth more."""
    engine.likeliest = tokenizer.eos_id
    short, long = [
        (await ask(client, best_of=2, length_penalty=penalty, early_stopping="never")).json()
        for penalty in (1.0, 10.0)
    ]
    tokens = [answer["usage"]["completion_tokens"] for answer in (short, long)]
    assert tokens == [1, LENGTH]


async def test_too_many_beams_are_refused_by_name(client: httpx.AsyncClient) -> None:
    error = (await ask(client, prompt=["a", "b", "c"], best_of=3)).json()["error"]
    assert error["param"] == "best_of"
    assert "3 prompts with 3 beams each are 9 beams: expected up to 8 in one request" in error["message"]


async def test_a_failing_search_fails_the_request(client: httpx.AsyncClient, engine: ModelEngine) -> None:
    engine.error = OverloadedError("full")
    response = await ask(client, best_of=3)
    assert response.json() == OverloadedError("full").body()
