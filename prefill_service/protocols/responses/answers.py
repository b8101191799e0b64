"""A chat's answer as OpenAI's response object: in one piece, or as its events."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from prefill_service.api.outcomes import RequestRecord
from prefill_service.api.responses import EventStream
from prefill_service.errors import ServingError
from prefill_service.protocols.chat import Json, named_event
from prefill_service.protocols.responses.requests import ResponsesRequest


@dataclass(slots=True)
class Answer:
    """The response object of one request, as far as it is made."""

    wanted: ResponsesRequest
    record: RequestRecord
    stored: bool
    output: list[Json] = field(default_factory=list)
    shared: Json = field(default_factory=dict)
    finish_reason: str | None = None

    def begin(self, chat: Json) -> None:
        """`chat`: the whole answer, or its first chunk: both say how it is sampled, and by which adapter."""
        wanted, report = self.wanted, chat["prad"]
        self.shared = {
            **report["sampling"],
            "id": f"resp_{chat['id'].partition('-')[2]}",
            "object": "response",
            "created_at": chat["created"],
            "model": chat["model"],
            "instructions": wanted.instructions,
            "max_output_tokens": wanted.max_output_tokens,
            "metadata": wanted.metadata or {},
            "parallel_tool_calls": wanted.parallel_tool_calls is not False,
            "previous_response_id": wanted.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": self.stored,
            "text": _text(wanted),
            "tool_choice": wanted.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in wanted.tools or ()],
            "truncation": "disabled",
            "prad": report,
        }

    def item_id(self, kind: str) -> str:
        """Of the item that is added next."""
        return f"{kind}_{self.shared['id'].removeprefix('resp_')}_{len(self.output)}"

    def under_way(self) -> Json:
        return {**self.shared, "status": "in_progress", "output": [], **_NEITHER, "usage": None}

    def whole(self) -> Json:
        cut = self.finish_reason == "length"
        why = {"incomplete_details": {"reason": "max_output_tokens"}} if cut else {}
        status = {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
        }
        return {**self.shared, **status, "output": self.output, **_NEITHER, **why, "usage": self._usage()}

    def failed(self, error: ServingError) -> Json:
        told = {"code": error.code or "server_error", "message": error.message}
        return {
            **self.shared,
            "status": "failed",
            "output": self.output,
            **_NEITHER,
            "error": told,
            "usage": None,
        }

    def messages(self) -> list[Json]:
        """What it adds to the conversation, as a chat has it."""
        text = "".join(part["text"] for item in self.output for part in item.get("content", ()))
        calls = [_chat_call(item) for item in self.output if item["type"] == "function_call"]
        return [
            {"role": "assistant", "content": text or (None if calls else "")}
            | ({"tool_calls": calls} if calls else {})
        ]

    def _usage(self) -> Json:
        record = self.record
        return {
            "input_tokens": record.prompt_tokens,
            "input_tokens_details": {"cached_tokens": record.cached_tokens},
            "output_tokens": record.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": record.prompt_tokens + record.completion_tokens,
        }


_NEITHER = {"error": None, "incomplete_details": None}


def fill(answer: Answer, chat: Json) -> None:
    """With the chat's whole answer."""
    (choice,) = chat["choices"]
    said = choice["message"]
    answer.begin(chat)
    answer.finish_reason = choice["finish_reason"]
    calls = said.get("tool_calls") or ()
    if said["content"] or not calls:
        answer.output.append(message_item(answer.item_id("msg"), said["content"] or "", "completed"))
    for call in calls:
        answer.output.append(
            call_item(answer.item_id("fc"), call, call["function"]["arguments"], "completed")
        )
    if answer.finish_reason == "length":
        answer.output[-1]["status"] = "incomplete"


def message_item(name: str, text: str | None, status: str) -> Json:
    """`text` None: of an item that begins."""
    content = [] if text is None else [text_part(text)]
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": content}


def text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(name: str, call: Json, arguments: str, status: str) -> Json:
    function = {"name": call["function"]["name"], "arguments": arguments}
    return {"id": name, "type": "function_call", "call_id": call["id"], **function, "status": status}


def _chat_call(item: Json) -> Json:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _text(wanted: ResponsesRequest) -> Json:
    said = {} if wanted.text is None else wanted.text.model_dump(by_alias=True, exclude_none=True)
    return {"format": {"type": "text"}, **said}


class ResponseStream(EventStream):
    """`answer`: what it is the stream of."""

    done = b""

    def __init__(
        self,
        answer: Answer,
        chunks: AsyncGenerator[Json, None],
        ended: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        self._answer = answer
        self._written = _Events(answer)
        super().__init__(self._written.of(chunks, ended), answer.record, headers)

    def broken(self, told: ServingError) -> bytes:
        return self._written.event("response.failed", response=self._answer.failed(told))


class _Events:
    """Writes the events of a response; one item of its output is open at a time."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._number = 0
        self._call: Json | None = None  # the open function call; else what is open is a message
        self._name = ""  # of the open item
        self._parts: list[str] = []

    async def of(
        self, chunks: AsyncGenerator[Json, None], ended: Callable[[], None]
    ) -> AsyncGenerator[bytes, None]:
        """`ended` is called when the answer is whole. Closing it ends the request."""
        answer = self._answer
        async with aclosing(chunks):
            async for chunk in chunks:
                events = b"" if answer.shared else self._begin(chunk)
                for choice in chunk["choices"]:
                    events += self._add(choice["delta"])
                    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
                if events:
                    yield events
        last = self._close() if self._name or answer.output else self._open() + self._close()
        whole = answer.whole()
        ended()
        yield last + self.event(f"response.{whole['status']}", response=whole)

    def event(self, kind: str, /, **data: object) -> bytes:
        self._number += 1
        return named_event(kind, {"type": kind, "sequence_number": self._number - 1, **data})

    def _begin(self, chunk: Json) -> bytes:
        self._answer.begin(chunk)
        response = self._answer.under_way()
        return self.event("response.created", response=response) + self.event(
            "response.in_progress", response=response
        )

    def _add(self, delta: Json) -> bytes:
        events = b""
        if text := delta.get("content"):
            if not self._name or self._call is not None:
                events += self._close() + self._open()
            self._parts.append(text)
            events += self._part_event("response.output_text.delta", delta=text, logprobs=[])
        for call in delta.get("tool_calls") or ():
            if call.get("id"):
                events += self._close() + self._open(call)
            if arguments := call["function"].get("arguments"):
                self._parts.append(arguments)
                events += self._item_event("response.function_call_arguments.delta", delta=arguments)
        return events

    def _open(self, call: Json | None = None) -> bytes:
        self._call, self._parts = call, []
        self._name = self._answer.item_id("msg" if call is None else "fc")
        if call is not None:
            item = call_item(self._name, call, "", "in_progress")
            return self._output_event("response.output_item.added", item=item)
        item = message_item(self._name, None, "in_progress")
        return self._output_event("response.output_item.added", item=item) + self._part_event(
            "response.content_part.added", part=text_part("")
        )

    def _close(self) -> bytes:
        """Ends the open item, if one is."""
        if not self._name:
            return b""
        text, call = "".join(self._parts), self._call
        cut = "incomplete" if self._answer.finish_reason == "length" else "completed"
        if call is not None:
            item = call_item(self._name, call, text, cut)
            events = self._item_event(
                "response.function_call_arguments.done", arguments=text, name=item["name"]
            )
        else:
            item = message_item(self._name, text, cut)
            events = self._part_event("response.output_text.done", text=text, logprobs=[])
            events += self._part_event("response.content_part.done", part=text_part(text))
        events += self._output_event("response.output_item.done", item=item)
        self._answer.output.append(item)
        self._name = ""
        return events

    def _output_event(self, kind: str, /, **data: object) -> bytes:
        return self.event(kind, output_index=len(self._answer.output), **data)

    def _item_event(self, kind: str, /, **data: object) -> bytes:
        return self._output_event(kind, item_id=self._name, **data)

    def _part_event(self, kind: str, /, **data: object) -> bytes:
        return self._item_event(kind, content_index=0, **data)
