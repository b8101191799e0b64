"""The same evaluation through a running server: what its clients get, over HTTP."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from prad.core.errors import PradError
from prad.http.asking import answered, api_client
from prad.training.data import read_examples, without_end
from prad.training.evaluate import ANSWER_TOKENS, Evaluation
from prad.training.tracking import tracked


class ServerError(PradError):
    """The server cannot be reached, or refuses a request; the message says what it said."""


def evaluate_served(
    url: str,
    task: str | None,
    data: Path,
    *,
    limit: int | None = None,
    max_tokens: int | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    concurrency: int = 64,
    key: str = "",
) -> Evaluation:
    """Answers of the server at `url` for `task` (None: its plain model, with bare prompts).

    Greedy, or the best of `beams` beams by `length_penalty`; compared without the task's end token, which the
    server tells. Prompts that are too long keep their end; with task tokens in the template they are refused.
    max_tokens: of an answer; None: the task's own, or ANSWER_TOKENS. `concurrency` requests are under way at
    once. `key`: an API key, where the server asks for one. Raises DataError or ServerError.
    """
    examples = read_examples(data, limit)
    with (
        api_client(url, concurrency, ServerError, key=key) as client,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        told = {} if task is None else _task(client, task)
        examples = without_end(examples, told.get("end_token"))
        own = told.get("generation", {}).get("max_tokens")
        body: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens or own or ANSWER_TOKENS}
        if not told.get("task_tokens"):  # which the server would cut off, and a folder does not
            body["truncate_prompt_tokens"] = -1
        if beams > 1:
            body |= {"use_beam_search": True, "best_of": beams, "length_penalty": length_penalty}
        if task is not None:
            body["task"] = task
        asked = [pool.submit(_ask, client, body | {"prompt": example.prompt}) for example in examples]
        try:
            answers = [one.result() for one in tracked(asked, len(asked), "evaluating")]
        finally:
            pool.shutdown(cancel_futures=True)
    return Evaluation.of(examples, answers)


def _task(client: httpx.Client, task: str) -> dict[str, Any]:
    """What the server tells of a task. Raises ServerError."""
    described = answered(client, ServerError, "GET", f"/v1/models/{quote(task)}")
    if "prad" not in described:
        raise ServerError(f"{task} is the plain model: it is asked where no task is named")
    told: dict[str, Any] = described["prad"]
    return told


def _ask(client: httpx.Client, body: dict[str, Any]) -> str:
    text: str = answered(client, ServerError, "POST", "/v1/completions", body)["choices"][0]["text"]
    return text if "task" in body else text.removeprefix(" ")  # for a task the server leaves it out
