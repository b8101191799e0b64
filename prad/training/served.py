"""The same evaluation through a running server: what its clients get, over HTTP."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.progress import track

from prad.training.data import read_examples, without_end
from prad.training.evaluate import Evaluation


class ServerError(Exception):
    """The server cannot be reached, or refuses a request; the message says what it said."""


def evaluate_served(
    url: str,
    task: str | None,
    data: Path,
    *,
    limit: int | None = None,
    beams: int = 1,
    concurrency: int = 64,
) -> Evaluation:
    """Answers of the server at `url` for `task` (None: its plain model, with bare prompts).

    Greedy, or the best of `beams` beams; compared without the task's end token, which the server tells.
    `concurrency` requests are under way at once. Raises DataError or ServerError.
    """
    examples = read_examples(data, limit)
    connections = httpx.Limits(max_connections=concurrency)
    try:
        opened = httpx.Client(base_url=url, timeout=httpx.Timeout(600, connect=10), limits=connections)
    except httpx.InvalidURL as error:
        raise ServerError(f"{url!r} is no address of a server: {error}") from error
    with opened as client, ThreadPoolExecutor(concurrency) as pool:
        examples = without_end(examples, None if task is None else _end_token(client, task))
        asked = [pool.submit(_ask, client, task, example.prompt, beams) for example in examples]
        try:
            answers = [
                one.result()
                for one in track(
                    asked, description="evaluating", console=Console(stderr=True), transient=True
                )
            ]
        finally:
            pool.shutdown(cancel_futures=True)
    return Evaluation.of(examples, answers)


def _ask(client: httpx.Client, task: str | None, prompt: str, beams: int) -> str:
    body: dict[str, Any] = {"prompt": prompt, "temperature": 0.0}
    if beams > 1:
        body |= {"use_beam_search": True, "best_of": beams}
    if task is not None:
        body["task"] = task
    text: str = _answered(client, "POST", "/v1/completions", body)["choices"][0]["text"]
    return text if task is not None else text.removeprefix(" ")  # for a task the server leaves it out


def _end_token(client: httpx.Client, task: str) -> str | None:
    described = _answered(client, "GET", f"/v1/models/{quote(task)}")
    found: str | None = described.get("prad", {}).get("end_token")
    return found


def _answered(client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON of an answer. Raises ServerError."""
    try:
        response = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise ServerError(f"no answer from {client.base_url}: {error}") from error
    if response.is_error:
        raise ServerError(f"{client.base_url} answers {response.status_code}: {_reason(response)}")
    return response.json()


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
