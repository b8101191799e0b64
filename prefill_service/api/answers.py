"""The JSON of answers: a whole choice, its first and its later chunks, log-probabilities in two forms.

Pure."""

from collections.abc import Sequence
from typing import Protocol

from prefill_service.api.generate import Delta
from prefill_service.api.text import TokenScore

Json = dict[str, object]


class Shape(Protocol):
    """`whole_object` and `chunk_object` are OpenAI's names of a complete answer and of one chunk."""

    whole_object: str
    chunk_object: str

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        """A finished choice; `scores` None: log-probabilities were not asked for."""
        ...

    def opening(self, index: int) -> Json | None:
        """What goes before a choice's first delta in a stream."""
        ...

    def chunk(self, delta: Delta) -> Json: ...


class CompletionShape:
    whole_object = chunk_object = "text_completion"

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        logprobs = None if scores is None else _completion_logprobs(scores)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> Json | None:
        return None

    def chunk(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": _completion_logprobs(delta.scores) if delta.scores else None,
            "finish_reason": delta.finish_reason,
        }


class ChatShape:
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if scores is None else _chat_logprobs(scores),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> Json | None:
        return _chat_chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, delta: Delta) -> Json:
        content: Json = {"content": delta.text} if delta.text or delta.scores else {}
        logprobs = _chat_logprobs(delta.scores) if delta.scores else None
        return _chat_chunk(delta.index, content, logprobs, delta.finish_reason)


def _chat_chunk(
    index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None
) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _completion_logprobs(scores: Sequence[TokenScore]) -> dict[str, object]:
    """Of /v1/completions; the drawn token is among its alternatives even if it is not a likely one."""
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_alternatives(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _chat_logprobs(scores: Sequence[TokenScore]) -> dict[str, object]:
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
