"""`best_of` of drawn answers: the likeliest per token of as many, whole and with what is theirs."""

from typing import Any

import httpx
import pytest

DRAWN = {"model": "plain", "max_tokens": 8, "temperature": 1.4, "seed": 3}


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = await client.post(path, json=DRAWN | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def worth(choice: dict[str, Any]) -> float:
    told = choice["logprobs"]["token_logprobs"]
    return float(sum(told) / len(told))


async def test_the_likeliest_per_token_are_given_the_best_first(client: httpx.AsyncClient) -> None:
    prompts = ["the food", "Hello world"]
    all_of = await ask(client, prompt=prompts, n=4, logprobs=0, return_token_ids=True)
    expected = []
    for at in range(2):
        its = sorted(all_of["choices"][4 * at : 4 * at + 4], key=worth, reverse=True)
        expected += its[:2]
    assert expected[0]["text"] != expected[1]["text"], "they are drawn apart"
    best = await ask(client, prompt=prompts, n=2, best_of=4, logprobs=0, return_token_ids=True)
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    for choice, wanted in zip(best["choices"], expected, strict=True):
        assert choice | {"index": 0} == wanted | {"index": 0}
    assert best["usage"] == all_of["usage"], "all that are drawn are computed"
    bare = await ask(client, prompt=prompts, n=2, best_of=4)
    assert [(c["text"], c["logprobs"]) for c in bare["choices"]] == [(c["text"], None) for c in expected]
    assert "token_ids" not in bare["choices"][0]


async def test_a_chat_has_it_too(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "hello"}]
    all_of = (await ask(client, model="talk", messages=messages, n=4, logprobs=True))["choices"]

    def of(choice: dict[str, Any]) -> float:
        told = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return float(sum(told) / len(told))

    (best,) = (await ask(client, model="talk", messages=messages, best_of=4))["choices"]
    assert best["message"] == max(all_of, key=of)["message"]


@pytest.mark.parametrize(
    "body", [{"stream": True}, {"echo": True}, {"prompt_logprobs": 1}, {"max_tokens": 0}]
)
async def test_it_chooses_among_whole_answers(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    response = await client.post("/v1/completions", json=DRAWN | {"prompt": "x", "best_of": 3, "n": 2} | body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "best_of"), response.text


async def test_all_that_are_drawn_count_against_what_one_request_may_hold(client: httpx.AsyncClient) -> None:
    asked = DRAWN | {"prompt": ["x"] * 3, "best_of": 4}
    response = await client.post("/v1/completions", json=asked)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "best_of"), response.text
