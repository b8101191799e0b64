"""A running server's tasks as a model of lm-eval: contexts are adapted, answers are the plain model's.

lm-eval's `local-completions` sends context and answer as one prompt, as it has to where nothing tells them
apart: an adapter would act on both. Here the context is the prompt, which the server puts into the task's
template, and the answer to be scored its continuation. Both are tokenised apart, as in training.

    python -m prad.harness --model prad --model_args task=sentiment --tasks mine --include_path .
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from prad.core.errors import PradError

_AT_ONCE = 32
"""Prompts of one request."""
_MAX_TOKENS = 256
"""Of an answer, where a task does not say how many."""

Json = dict[str, Any]


class AskingError(PradError):
    """The server cannot be reached, or refuses; the message says what it said."""


@register_model("prad")
class PradModel(LM):  # type: ignore[misc]  # lm-eval is not installed where this is checked
    """task: with or without a version or alias, as in support@3; None: the plain model. base_url: of the
    server, with or without /v1. batch_size: prompts of one request; num_concurrent: requests at once. An API
    key comes from the environment, PRAD_API_KEY."""

    def __init__(
        self,
        task: str | None = None,
        base_url: str = "http://127.0.0.1:8000",
        batch_size: int | str = _AT_ONCE,
        num_concurrent: int = 4,
        timeout: float = 600.0,
        **_: object,  # what lm-eval gives to every model, as a device
    ) -> None:
        super().__init__()
        self._body: Json = {} if task is None else {"task": task}
        self._url = (
            base_url.rstrip("/").removesuffix("/v1").removesuffix("/v1/completions") + "/v1/completions"
        )
        self._batch = int(batch_size) if str(batch_size).isdecimal() else _AT_ONCE
        self._concurrent = int(num_concurrent)
        self._timeout = float(timeout)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: its sum, and whether each token was the likeliest."""
        bodies = [
            self._body
            | {
                "prompt": [context for context, _ in batch],
                "continuation": [continuation for _, continuation in batch],
                "continuation_logprobs": 0,
                "max_tokens": 0,
            }
            for batch in _batches([request.args for request in requests], self._batch)
        ]
        return [_summed(choice["continuation_logprobs"]) for choice in self._choices(bodies)]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to the contexts; what else a task says of how to draw goes to the server as it is."""
        return [choice["text"] for choice in self._choices([self._drawing(*r.args) for r in requests])]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        raise NotImplementedError(
            "a text without a prompt has nothing to adapt: for the plain model's perplexity use lm-eval's "
            "local-completions"
        )

    @property
    def tokenizer_name(self) -> str:
        return "prad"

    def _drawing(self, context: str, settings: Mapping[str, Any]) -> Json:
        more = dict(settings)
        until = more.pop("until", None) or []
        temperature, sampled = more.pop("temperature", 0.0), more.pop("do_sample", False)
        body = self._body | {
            "prompt": context,
            "max_tokens": more.pop("max_gen_toks", _MAX_TOKENS),
            "stop": [until] if isinstance(until, str) else until,
            "temperature": temperature if sampled else 0.0,
        }
        return body | more

    def _choices(self, bodies: Sequence[Json]) -> Iterator[Json]:
        """Of all requests, in order. Raises AskingError."""
        with ThreadPoolExecutor(self._concurrent) as pool:
            for answer in pool.map(self._asked, bodies):
                yield from sorted(answer["choices"], key=lambda choice: choice["index"])

    def _asked(self, body: Json) -> Json:
        headers = {"content-type": "application/json"}
        if key := os.environ.get("PRAD_API_KEY"):
            headers["authorization"] = f"Bearer {key}"
        request = Request(self._url, json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=self._timeout) as response:
                answer: Json = json.load(response)
                return answer
        except HTTPError as error:
            raise AskingError(f"{self._url} answers {error.code}: {_reason(error)}") from error
        except (URLError, TimeoutError) as error:
            raise AskingError(f"no answer from {self._url}: {error}. Name another with base_url=") from error


def _batches(pairs: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(pairs), most):
        yield pairs[start : start + most]


def _summed(tokens: Sequence[Mapping[str, Mapping[str, Any]]]) -> tuple[float, bool]:
    """Each token stands before its alternatives."""
    own = [next(iter(token.values())) for token in tokens]
    return sum(each["logprob"] for each in own), all(each["rank"] == 1 for each in own)


def _reason(error: HTTPError) -> str:
    said = error.read().decode("utf-8", "replace")
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return said[:200]
