"""A chat's answers: messages, chunks, calls of tools, log-probabilities."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from prefill_service.api.messages import Json
from prefill_service.api.requests import ChatRequest
from prefill_service.api.text import Delta, TokenName, TokenScore
from prefill_service.api.tool_calls import CallParser, Said
from prefill_service.api.tool_formats import ToolFormat


class ChatShape:
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    many_prompts = False

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if scores is None else _logprobs(scores),
            "finish_reason": finish_reason,
        }

    def opening(self, index: int) -> Json | None:
        return _chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, delta: Delta) -> Json | None:
        content: Json = {"content": delta.text} if delta.text or delta.scores else {}
        return _chunk(delta.index, content, delta.scores, delta.finish_reason)


class ToolShape(ChatShape):
    """Of a chat whose model may call tools, as it writes calls; each choice is read as it comes."""

    def __init__(self, form: ToolFormat, schemas: Mapping[str, Json], *, only_first: bool) -> None:
        self._parsers: defaultdict[int, CallParser] = defaultdict(
            lambda: CallParser(form, schemas, schemas=schemas, only_first=only_first)
        )

    def whole(self, index: int, text: str, scores: Sequence[TokenScore] | None, finish_reason: str) -> Json:
        answer = super().whole(index, text, scores, finish_reason)
        said = self._said(index, text, finish_reason)
        if not said.calls:
            return answer
        calls = [call.as_whole() for call in said.calls]
        message = {"role": "assistant", "content": said.content or None, "refusal": None, "tool_calls": calls}
        return {**answer, "message": message, "finish_reason": self._reason(index, finish_reason)}

    def opening(self, index: int) -> Json | None:
        """Nobody knows yet whether there will be content."""
        return _chunk(index, {"role": "assistant", "content": None})

    def chunk(self, delta: Delta) -> Json | None:
        said = self._said(delta.index, delta.text, delta.finish_reason)
        news: Json = {"content": said.content} if said.content else {}
        if said.calls:
            news["tool_calls"] = [call.as_delta() for call in said.calls]
        if not (news or delta.scores or delta.ids or delta.finish_reason):
            return None
        return _chunk(delta.index, news, delta.scores, self._reason(delta.index, delta.finish_reason))

    def _said(self, index: int, text: str, finish_reason: str | None) -> Said:
        parser = self._parsers[index]
        said = parser.feed(text)
        if finish_reason is None:
            return said
        return Said(said.content + parser.close(), said.calls)

    def _reason(self, index: int, finish_reason: str | None) -> str | None:
        return "tool_calls" if finish_reason == "stop" and self._parsers[index].calls else finish_reason


def chat_shape(request: ChatRequest, form: ToolFormat | None) -> ChatShape:
    """`form`: how the model writes calls, of which a request that offers tools has one."""
    if form is None or not request.offered:
        return ChatShape()
    schemas = {tool.function.name: tool.function.parameters or {} for tool in request.offered}
    return ToolShape(form, schemas, only_first=request.parallel_tool_calls is False)


def _chunk(
    index: int, delta: Json, scores: Sequence[TokenScore] = (), finish_reason: str | None = None
) -> Json:
    logprobs = _logprobs(scores) if scores else None
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprobs(scores: Sequence[TokenScore]) -> Json:
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


def _entry(token: TokenName, logprob: float | None) -> Json:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.raw)}
