"""Log-probabilities in OpenAI's two formats."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from prad.core.tokens import Token
from prad.lm import Tokenizer

REMEMBERED_TOKENS = 65_536
LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One output token. `top`: the likeliest alternatives, best first; `offset`: characters before it."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


class TokenScorer:
    """Puts names to the engine's numbers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._name = lru_cache(REMEMBERED_TOKENS)(tokenizer.token_text)

    def score(self, draw: Token, offset: int) -> TokenScore:
        assert draw.logprob is not None
        top = tuple((self._name(token), max(logprob, LOWEST)) for token, logprob in draw.top)
        return TokenScore(self._name(draw.id), max(draw.logprob, LOWEST), top, offset)


def completion_logprobs(scores: Sequence[TokenScore]) -> dict[str, object]:
    """Of /v1/completions; the drawn token is among its alternatives even if it is not a likely one."""
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_alternatives(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def chat_logprobs(scores: Sequence[TokenScore]) -> dict[str, object]:
    """Of /v1/chat/completions."""
    return {
        "content": [
            {
                **_entry(score.token, score.logprob),
                "top_logprobs": [_entry(token, logprob) for token, logprob in score.top],
            }
            for score in scores
        ],
        "refusal": None,
    }


def _alternatives(score: TokenScore) -> dict[str, float]:
    """Two ids may share a text (parts of a character do): the likelier one stays."""
    named = {score.token: score.logprob}
    for token, logprob in score.top:
        named[token] = max(logprob, named.get(token, logprob))
    return named


def _entry(token: str, logprob: float) -> dict[str, object]:
    return {"token": token, "logprob": logprob, "bytes": _bytes(token)}


def _bytes(token: str) -> list[int] | None:
    """None for a part of a character, which has no text of its own."""
    return None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode())
