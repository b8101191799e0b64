"""A chat's answer as Anthropic's message: in one piece, or as its events; and its refusals."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from prefill_service.api.messages import written_arguments
from prefill_service.api.outcomes import RequestRecord, error_body
from prefill_service.api.responses import EventStream
from prefill_service.errors import ServingError
from prefill_service.protocols.chat import Json, named_event

_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def message_of(chat: Json, record: RequestRecord) -> Json:
    (choice,) = chat["choices"]
    said = choice["message"]
    calls = said.get("tool_calls") or ()
    content = [{"type": "text", "text": said["content"] or ""}] if said["content"] or not calls else []
    for call in calls:
        content.append(_tool_use(call) | {"input": written_arguments(call["function"]["arguments"])})
    return {**_opening(chat, record), "content": content, **_stop(choice, record), "usage": _usage(record)}


def failure_of(body: Json, status: int, request_id: str) -> Json:
    """OpenAI's error object as Anthropic's; `param` and `code` stay, as they say more."""
    others = "invalid_request_error" if status < 500 else "api_error"
    error = {
        "type": _ERRORS.get(status, others),
        **{k: v for k, v in body["error"].items() if k != "type"},
    }
    return {"type": "error", "error": error, "request_id": request_id}


class MessageStream(EventStream):
    done = b""

    def broken(self, told: ServingError) -> bytes:
        return named_event("error", failure_of(dict(error_body(told)), told.status, self._record.id))


async def events_of(chunks: AsyncGenerator[Json, None], record: RequestRecord) -> AsyncGenerator[bytes, None]:
    """Closing it ends the request."""
    blocks, stop, opened = _Blocks(), _stop({"finish_reason": "stop"}, record), False
    async with aclosing(chunks):
        async for chunk in chunks:
            events = []
            if not opened:
                opened = True
                message = {
                    **_opening(chunk, record),
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                }
                events += [_event("message_start", message=message | {"usage": _usage(record)})]
            for choice in chunk["choices"]:
                events += blocks.add(choice["delta"])
                if choice["finish_reason"] is not None:
                    stop = _stop(choice, record)
            if events:
                yield b"".join(events)
    yield b"".join(blocks.close()) + _event("message_delta", delta=stop, usage=_usage(record))
    yield _event("message_stop")


@dataclass(slots=True)
class _Blocks:
    """The content blocks of a stream: one is open at a time, and there is at least one."""

    count: int = 0
    kind: str = ""
    events: list[bytes] = field(default_factory=list)

    def add(self, delta: Json) -> list[bytes]:
        """The events of one more delta of the chat."""
        self.events = []
        if text := delta.get("content"):
            if self.kind != "text":
                self._open({"type": "text", "text": ""})
            self._delta(type="text_delta", text=text)
        for call in delta.get("tool_calls") or ():
            if call.get("id"):
                self._open(_tool_use(call) | {"input": {}})
            if arguments := call["function"].get("arguments"):
                self._delta(type="input_json_delta", partial_json=arguments)
        return self.events

    def close(self) -> list[bytes]:
        self.events = []
        if not self.count:
            self._open({"type": "text", "text": ""})
        self._stop()
        return self.events

    def _open(self, block: Json) -> None:
        if self.count:
            self._stop()
        self.count, self.kind = self.count + 1, block["type"]
        self.events.append(_event("content_block_start", index=self.count - 1, content_block=block))

    def _delta(self, **delta: str) -> None:
        self.events.append(_event("content_block_delta", index=self.count - 1, delta=delta))

    def _stop(self) -> None:
        self.events.append(_event("content_block_stop", index=self.count - 1))


def _opening(chat: Json, record: RequestRecord) -> Json:
    """Of a whole answer, or of the first chunk: both say which adapter answers."""
    return {
        "id": f"msg_{chat['id'].partition('-')[2]}",
        "type": "message",
        "role": "assistant",
        "model": chat["model"],
        "prad": chat.get("prad"),
    }


def _tool_use(call: Json) -> Json:
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"]}


def _stop(choice: Json, record: RequestRecord) -> Json:
    if choice["finish_reason"] == "stop" and record.stopped_by is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": record.stopped_by}
    return {"stop_reason": _STOPS.get(choice["finish_reason"], "end_turn"), "stop_sequence": None}


def _usage(record: RequestRecord) -> Json:
    """Anthropic's `input_tokens` are those that no cache had."""
    return {
        "input_tokens": record.prompt_tokens - record.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": record.cached_tokens,
        "output_tokens": record.completion_tokens,
    }


def _event(name: str, **data: Any) -> bytes:
    return named_event(name, {"type": name, **data})
