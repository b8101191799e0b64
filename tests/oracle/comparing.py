"""What the served stack says, and when that equals the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from torch import Tensor

TOLERANCE = 1e-4  # of the logit range
CLEAR = 10 * TOLERANCE  # a top-two gap beyond which greedy tokens must be equal
TOP = 20


class OracleMismatchError(AssertionError):
    """The stack does not say what the reference says."""


@dataclass(frozen=True)
class Served:
    """One answer: its token ids, and for each the log-probabilities of the likeliest ids."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def body(prompt: Sequence[int], task: str | None, max_tokens: int, **more: object) -> dict[str, object]:
    """A greedy request of exactly `max_tokens` tokens with their log-probabilities, and no template."""
    return {
        "prompt": list(prompt),
        **({} if task is None else {"task": task}),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": TOP,
        "raw_prompt": True,
        **more,
    }


def served(response: httpx.Response, choice: int = 0) -> Served:
    assert response.status_code == 200, response.text
    logprobs = response.json()["choices"][choice]["logprobs"]
    return Served(
        [_token_id(t) for t in logprobs["tokens"]],
        [{_token_id(t): p for t, p in top.items()} for top in logprobs["top_logprobs"]],
    )


def _token_id(text: str) -> int:
    return 119 if text == "</s>" else int(text.strip().removeprefix("t"))


def check(answer: Served, reference: Tensor) -> int:
    """Compares every step; returns how many had a clear winner. Raises OracleMismatchError.

    reference [steps, vocab] are the logits, teacher-forced on the answer's own tokens.
    """
    clear = 0
    for step, (token, served_top) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        logits = reference[step]
        scale = float(logits.max() - logits.min())
        expected = logits.log_softmax(-1)
        worst = max(abs(float(expected[i]) - p) for i, p in served_top.items())
        if worst > TOLERANCE * scale:
            raise OracleMismatchError(f"step {step}: off by {worst:.2e} of a range of {scale:.2e}")
        best = logits.topk(2).values
        if float(best[0] - best[1]) > CLEAR * scale:
            clear += 1
            if token != int(logits.argmax()):
                raise OracleMismatchError(f"step {step}: token {token}, expected {int(logits.argmax())}")
    return clear


def check_given(listed: Sequence[dict[str, Any] | None], tokens: Sequence[int], reference: Tensor) -> None:
    """Compares `prompt_logprobs` of these tokens. Raises OracleMismatchError.

    reference [len(tokens) - 1, vocab] are the logits that predict each but the first.
    """
    first, *others = listed
    assert first is None
    for step, (told, token, logits) in enumerate(zip(others, tokens[1:], reference, strict=True)):
        assert told is not None
        assert int(next(iter(told))) == token
        scale, expected = float(logits.max() - logits.min()), logits.log_softmax(-1)
        worst = max(abs(float(expected[int(i)]) - each["logprob"]) for i, each in told.items())
        if worst > TOLERANCE * scale:
            raise OracleMismatchError(f"token {step + 1}: off by {worst:.2e} of a range of {scale:.2e}")
