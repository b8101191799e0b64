"""What an answer says of what it was given: echo, log-probabilities of prompts, continuations; and answers
of no tokens."""

from typing import Any

import httpx
import pytest

from prad.core.sampling import Scoring
from prad.lm import Tokenizer
from tests.prefill_api.conftest import ModelEngine
from tests.prefill_api.test_http_completions import PROMPT, complete, events

GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 5}
USER = [{"role": "user", "content": PROMPT}]


async def refusal(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": PROMPT, **body})
    assert response.status_code == 400, response.text
    return response.json()["error"]


def consistent(choice: dict[str, Any], given: str = PROMPT) -> dict[str, Any]:
    """Its log-probabilities; those of tokens in the given text stand where they say."""
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(logprobs["tokens"])}
    assert choice["text"].startswith(given)
    spelled = ""
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if offset >= len(given):
            break
        assert offset == len(spelled)
        spelled += token
    assert spelled == given
    return logprobs


async def test_an_echo_stands_before_every_answer(client: httpx.AsyncClient) -> None:
    body = {**GREEDY, "prompt": [PROMPT, "Hello world"], "n": 2, "temperature": 1, "seed": 3}
    alone, echoed = await complete(client, **body), await complete(client, **body, echo=True)
    for index, (one, other) in enumerate(zip(alone["choices"], echoed["choices"], strict=True)):
        assert other["text"] == body["prompt"][index // 2] + one["text"]
        assert other["logprobs"] is None
    assert alone["usage"] == echoed["usage"]


async def test_echoed_tokens_have_the_models_log_probabilities(
    client: httpx.AsyncClient, engine: ModelEngine, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode_prompt(PROMPT)
    (choice,) = (await complete(client, **GREEDY, echo=True, logprobs=2))["choices"]
    logprobs = consistent(choice)
    assert logprobs["tokens"][: len(ids)] == [tokenizer.token_text(token) for token in ids]
    assert len(logprobs["tokens"]) == len(ids) + 5
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    expected = engine.scores(engine.requests[-1], Scoring(0, 2))
    found = logprobs["token_logprobs"][1 : len(ids)]
    assert found == [score.logprob for score in expected if score is not None]
    for token, logprob, top in list(
        zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )[1:]:
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
    unechoed = (await complete(client, **GREEDY, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][len(ids) :] == unechoed["token_logprobs"]


async def test_no_tokens_are_drawn_if_none_are_wanted(client: httpx.AsyncClient, engine: ModelEngine) -> None:
    body = await complete(client, max_tokens=0, echo=True, logprobs=1, n=2)
    assert [(c["text"], c["finish_reason"]) for c in body["choices"]] == [(PROMPT, "length")] * 2
    assert body["usage"]["completion_tokens"] == 0
    (request,) = engine.requests
    assert (request.sampling.max_tokens, request.scoring) == (0, Scoring(0, 1))
    consistent(body["choices"][0])
    text = await complete(client, max_tokens=0, echo=True)
    assert text["choices"][0]["text"] == PROMPT
    assert engine.requests[-1].scoring is None
    full = await complete(client, prompt=[5] * 128, max_tokens=0, prompt_logprobs=0)
    assert len(full["choices"][0]["prompt_logprobs"]) == 128, "all of the context is the prompt's"


async def test_a_stream_begins_with_the_echo(client: httpx.AsyncClient) -> None:
    body = {**GREEDY, "prompt": [PROMPT, "Hello"], "n": 2, "echo": True, "logprobs": 1}
    whole = (await client.post("/v1/completions", json=body)).json()["choices"]
    chunks = [c for e in events(await client.post("/v1/completions", json={**body, "stream": True}))
              for c in e["choices"]]  # fmt: skip
    for choice in whole:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert own[0]["text"] == body["prompt"][choice["index"] // 2]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [v for chunk in own if chunk["logprobs"] for v in chunk["logprobs"][name]] == values
        assert own[-1]["finish_reason"] == "length"
    one = await client.post(
        "/v1/completions", json={"prompt": "Hello", "echo": True, "max_tokens": 0, "stream": True}
    )
    told = [c for e in events(one) for c in e["choices"]]
    assert ("".join(c["text"] for c in told), told[-1]["finish_reason"]) == ("Hello", "length")


async def test_ids_are_echoed_as_text(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_prompt(PROMPT)
    (choice,) = (await complete(client, prompt=ids, **GREEDY, echo=True, logprobs=0))["choices"]
    assert choice["text"].startswith(PROMPT)
    consistent(choice)
    cut = await complete(client, truncate_prompt_tokens=1, echo=True, max_tokens=0)
    assert cut["choices"][0]["text"] == tokenizer.token_text(ids[-1])


async def test_a_prompts_log_probabilities_have_vllms_form(
    client: httpx.AsyncClient, engine: ModelEngine, tokenizer: Tokenizer
) -> None:
    body = await complete(client, **GREEDY, prompt_logprobs=2, n=2)
    first, second = (choice["prompt_logprobs"] for choice in body["choices"])
    assert first == second
    assert first[0] is None
    scores = engine.scores(engine.requests[-1], Scoring(0, 2))
    for told, score in zip(first[1:], scores, strict=True):
        assert score is not None
        assert next(iter(told)) == str(score.id)
        own = told[str(score.id)]
        assert (own["logprob"], own["rank"]) == (score.logprob, score.rank)
        assert own["decoded_token"] == tokenizer.token_text(score.id)
        assert {rank: told[str(token)]["rank"] for rank, (token, _) in enumerate(score.top, 1)} == {
            1: 1,
            2: 2,
        }
        assert len(told) == len({score.id, *(token for token, _ in score.top)})
    assert "continuation" not in body["choices"][0]
    chat = await client.post(
        "/v1/chat/completions",
        json={"messages": USER, "task": "talk", "prompt_logprobs": 0, "max_completion_tokens": 0},
    )
    assert chat.status_code == 200, chat.text
    told = chat.json()
    assert len(told["prompt_logprobs"]) == told["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in told["choices"][0]
    assert (told["choices"][0]["message"]["content"], told["choices"][0]["finish_reason"]) == ("", "length")


async def test_a_continuation_follows_without_template_or_stripped_space(
    client: httpx.AsyncClient, engine: ModelEngine, tokenizer: Tokenizer
) -> None:
    body = {**GREEDY, "task": "e2e", "stop": []}
    answer = await complete(client, **body, continuation=" the food")
    (request,) = engine.requests
    assert list(request.prompt_ids) == tokenizer.encode_prompt(f"#INPUT: {PROMPT} #OUTPUT:")
    assert list(request.continuation_ids) == tokenizer.encode_continuation(" the food")
    assert request.output_offset == 0
    given = len(request.prompt_ids) + len(request.continuation_ids)
    assert answer["usage"]["prompt_tokens"] == given
    by_ids = await complete(client, **body, continuation=list(request.continuation_ids))
    assert by_ids["choices"][0]["text"] == answer["choices"][0]["text"]
    assert "continuation" not in answer["choices"][0]
    echoed = (await complete(client, **body, continuation=" the food", echo=True))["choices"][0]
    assert echoed["text"] == PROMPT + " the food" + answer["choices"][0]["text"]
    assert echoed["continuation"] == {"token": len(request.prompt_ids), "text_offset": len(PROMPT)}


async def test_continuations_are_scored_for_each_prompt(
    client: httpx.AsyncClient, engine: ModelEngine, tokenizer: Tokenizer
) -> None:
    body = {"prompt": [PROMPT, PROMPT], "continuation": [" good", " the river"], "max_tokens": 0}
    scored = await complete(client, **body, continuation_logprobs=1)
    for choice, request, text in zip(scored["choices"], engine.requests, body["continuation"], strict=True):
        assert request.scoring == Scoring(len(request.prompt_ids), 1)
        told = choice["continuation_logprobs"]
        assert [int(next(iter(each))) for each in told] == tokenizer.encode_continuation(text)
        assert choice["text"] == ""
    both = await complete(client, **body, prompt_logprobs=0, continuation_logprobs=2, echo=True, logprobs=0)
    for choice, before, behind in zip(both["choices"], scored["choices"], body["continuation"], strict=True):
        start = choice["continuation"]["token"]
        listed = choice["prompt_logprobs"]
        assert (
            consistent(choice, PROMPT + behind)["text_offset"][start] == choice["continuation"]["text_offset"]
        )
        own = [next(iter(each.values()))["logprob"] for each in choice["continuation_logprobs"]]
        alone = [next(iter(each.values()))["logprob"] for each in before["continuation_logprobs"]]
        assert own == pytest.approx(alone, abs=1e-5)
        assert own == [next(iter(each.values()))["logprob"] for each in listed[start:]]
        assert own == choice["logprobs"]["token_logprobs"][start:]
        assert {len(each) for each in listed[1:]} == {1}


async def test_what_lm_eval_reads_is_the_answers_log_likelihood(
    client: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    """As its local-completions does: one token more than it sums up."""
    context, answer = tokenizer.encode_prompt(PROMPT), tokenizer.encode_continuation(" is good")
    asked = {"prompt": [[*context, *answer]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    (choice,) = (await complete(client, **asked, seed=1234))["choices"]
    found = choice["logprobs"]["token_logprobs"][len(context) : -1]
    scored = await complete(client, continuation=" is good", continuation_logprobs=0, max_tokens=0)
    told = scored["choices"][0]["continuation_logprobs"]
    assert found == pytest.approx([next(iter(each.values()))["logprob"] for each in told], abs=1e-5)


async def test_an_echo_inside_a_template_is_what_was_sent(client: httpx.AsyncClient) -> None:
    (choice,) = (await complete(client, task="e2e", **GREEDY, stop=[], echo=True))["choices"]
    assert choice["text"].startswith(PROMPT)
    error = await refusal(client, task="e2e", echo=True, logprobs=0)
    assert (error["param"], error["code"]) == ("echo", "template_not_echoed")
    for allowed in ({"task": "plain"}, {"task": "e2e", "raw_prompt": True}):
        (choice,) = (await complete(client, **GREEDY, **allowed, stop=[], echo=True, logprobs=0))["choices"]
        consistent(choice)
    inside = (await complete(client, task="e2e", prompt_logprobs=0, max_tokens=0))["choices"][0]
    assert len(inside["prompt_logprobs"]) > len(
        (await complete(client, prompt_logprobs=0))["choices"][0]["prompt_logprobs"]
    )


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "'max_tokens' 0 asks for no output"),
        ({"max_tokens": 0, "echo": False, "logprobs": 1}, "max_tokens", "asks for no output"),
        ({"max_tokens": 0, "continuation": "x"}, "max_tokens", "asks for no output"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "limited to 0"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "is not told in a stream"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
        ({"echo": 1}, "echo", "valid boolean"),
        ({"echo": True, "use_beam_search": True, "n": 2}, "echo", "'use_beam_search' takes no 'echo'"),
        ({"continuation": " a", "use_beam_search": True, "n": 2}, "continuation", "takes no 'continuation'"),
        ({"echo": True, "best_of": 3}, "best_of", "leave out 'stream', 'echo'"),
        ({"continuation_logprobs": 0}, "continuation_logprobs", "needs a 'continuation'"),
        ({"continuation": ["a", "b"]}, "continuation", "one for each prompt: got 2 for 1"),
        ({"prompt": ["a", "b"], "continuation": "a"}, "continuation", "got 1 for 2"),
        ({"continuation": ""}, "continuation", "is empty"),
        ({"continuation": []}, "continuation", "expected a text"),
        ({"continuation": [[]]}, "continuation", "is empty"),
        ({"continuation": [100_000]}, "continuation", "token id 100000 is out of range"),
        ({"continuation": "x" * 9000}, "continuation", "the context holds"),
        ({"prompt": [5] * 100, "continuation": [5] * 20, "max_tokens": 9}, "max_tokens", "beside 20 of"),
    ],
)  # fmt: skip
async def test_what_makes_no_sense_is_refused_by_name(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, message: str
) -> None:
    error = await refusal(client, **body)
    assert (error["param"], message in error["message"]) == (param, True), error


async def test_a_chat_is_not_echoed(client: httpx.AsyncClient) -> None:
    for field in ({"echo": True}, {"continuation": "x"}):
        response = await client.post("/v1/chat/completions", json={"messages": USER, **field})
        assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(field)))


async def test_an_answer_of_too_many_numbers_is_refused(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefill_service.api.showing.MOST_SCORES", 100)
    await complete(client, prompt=[5] * 50, prompt_logprobs=1, max_tokens=0)
    error = await refusal(client, prompt=[5] * 50, prompt_logprobs=1, n=2)
    assert "would hold 200 log-probabilities of given tokens: expected up to 100" in error["message"]


async def test_long_prompts_are_put_into_words_in_a_thread(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await complete(client, prompt_logprobs=1, echo=True, logprobs=1, **GREEDY)
    monkeypatch.setattr("prefill_service.api.showing._AT_ONCE", 0)
    there = await complete(client, prompt_logprobs=1, echo=True, logprobs=1, **GREEDY)
    assert here["choices"] == there["choices"]
