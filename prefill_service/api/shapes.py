"""How the two endpoints write the same things: a whole choice, the first and the later chunks of one."""

from collections.abc import Sequence
from typing import Protocol

from prefill_service.api.generate import Delta
from prefill_service.api.logprobs import TokenScore, chat_logprobs, completion_logprobs

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
        logprobs = None if scores is None else completion_logprobs(scores)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> Json | None:
        return None

    def chunk(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": completion_logprobs(delta.scores) if delta.scores else None,
            "finish_reason": delta.finish_reason,
        }


class ChatShape:
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if scores is None else chat_logprobs(scores),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> Json | None:
        return _chat_chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, delta: Delta) -> Json:
        content: Json = {"content": delta.text} if delta.text or delta.scores else {}
        logprobs = chat_logprobs(delta.scores) if delta.scores else None
        return _chat_chunk(delta.index, content, logprobs, delta.finish_reason)


def _chat_chunk(
    index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None
) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
