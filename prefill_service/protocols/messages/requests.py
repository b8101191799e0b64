"""What a client may send to `/v1/messages`, and the chat that it means."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import ConfigDict, FailFast, Field, PlainValidator, WithJsonSchema

from prefill_service.api.intake import Neutral, StrictModel, TokenCount, deeper, expected
from prefill_service.api.messages import MAX_DEPTH, MAX_MESSAGES, Content
from prefill_service.api.problems import shown
from prefill_service.api.requests import ChatRequest
from prefill_service.errors import InvalidRequestError
from prefill_service.protocols.chat import OTHER_ANSWERS, Json, Origin, chat_request, passed

_NAMES = {"max_tokens": "max_tokens", "stop": "stop_sequences", "user": "metadata"}
_TAKEN = OTHER_ANSWERS | {"max_completion_tokens", "stop", "user", "parallel_tool_calls"}


def _blocks(value: Any) -> str | list[Json]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(
        isinstance(b, dict) and isinstance(b.get("type"), str) for b in value
    ):
        raise expected("a text or a list of content blocks", value)
    return value


Blocks = Annotated[
    str | list[Json],
    PlainValidator(_blocks),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class Turn(StrictModel):
    """Blocks: `text`; of an assistant also `tool_use`, of a user also `tool_result`."""

    place: ClassVar[str] = "messages."

    role: Literal["user", "assistant"]
    content: Blocks
    """A text, or content blocks; texts of one turn are joined as they stand."""


class Metadata(StrictModel):
    place: ClassVar[str] = "metadata."

    user_id: str | None = None
    """Who asks, in words of the client's own: as `user` of a chat."""


class MessagesTool(StrictModel):
    place: ClassVar[str] = "tools."
    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control"})
    unsupported: ClassVar[Neutral] = {"type": ("custom",)}

    name: str
    input_schema: Json
    description: str | None = None
    strict: bool | None = None

    def as_chat(self) -> Json:
        more = {"description": self.description, "strict": self.strict}
        function = {"name": self.name, "parameters": self.input_schema}
        return {"type": "function", "function": function | {k: v for k, v in more.items() if v is not None}}


class ToolChoice(StrictModel):
    place: ClassVar[str] = "tool_choice."

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    """The tool, of type `tool`."""
    disable_parallel_tool_use: bool | None = None

    def as_chat(self) -> str | Json:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return {"auto": "auto", "any": "required", "none": "none"}[self.type]


class TokensRequest(StrictModel):
    """The body of `/v1/messages/count_tokens`. Beside these it may hold fields of a chat by their names, as
    `raw_prompt`."""

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[Neutral] = {
        "thinking": ({"type": "disabled"},),
        "container": (),
        "context_management": (),
        "mcp_servers": ([],),
        "output_config": ({},),
        "service_tier": ("auto", "standard_only"),
    }
    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    model: str
    """The plain model's id, or a task, which may name a version as in `e2e@3`, or an alias, `e2e@canary`."""
    messages: Annotated[list[Turn], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    """The conversation; an assistant's turn at its end is gone on with."""
    system: Content | None = None
    """A text, or text blocks, which are joined as they stand."""
    tools: list[MessagesTool] | None = None
    """Functions that the model may ask for."""
    tool_choice: ToolChoice | None = None
    """Whether it must, and which."""

    def as_chat(self, noted: set[str] | None = None) -> ChatRequest:
        """`noted`: where unknown fields are; None: they are refused. Raises InvalidRequestError."""
        fields = {"model": self.model, **passed(self.model_extra, _TAKEN, noted)}
        if self.tools:
            fields["tools"] = [tool.as_chat() for tool in self.tools]
        choice = self.tool_choice
        if choice is not None and (self.tools or choice.type not in ("auto", "none")):
            fields["tool_choice"] = choice.as_chat()  # without tools the chat refuses it
            if choice.disable_parallel_tool_use:
                fields["parallel_tool_calls"] = False
        if self.messages[-1].role == "assistant":
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        return chat_request(self._turns(), fields | self._own_fields(), _NAMES, noted)

    def _own_fields(self) -> Json:
        return {}

    def _turns(self) -> Iterator[tuple[Origin, Json]]:
        if self.system:
            yield ("system",), {"role": "system", "content": self.system}
        for number, turn in enumerate(self.messages):
            yield from _chat_turns(turn, ("messages", number))


class MessagesRequest(TokensRequest):
    """The body of `/v1/messages`. Beside these it may hold fields of a chat by their names, as `seed`."""

    max_tokens: TokenCount
    """The longest output."""
    stop_sequences: list[str] | None = None
    """Up to 16 texts that end the output, which is cut before them."""
    stream: bool | None = None
    """Send the answer as events while it is made. Absent: no."""
    metadata: Metadata | None = None
    """Who asks."""

    def _own_fields(self) -> Json:
        fields: Json = {"max_tokens": self.max_tokens, "stream": bool(self.stream)}
        if self.stop_sequences:
            fields["stop"] = self.stop_sequences
        if self.metadata is not None and self.metadata.user_id:
            fields["user"] = self.metadata.user_id
        return fields


def _chat_turns(turn: Turn, place: Origin) -> Iterator[tuple[Origin, Json]]:
    """A turn as messages of a chat: results of tools first, each as one."""
    if isinstance(turn.content, str):
        yield place, {"role": turn.role, "content": turn.content}
        return
    texts, calls = [], []
    for number, block in enumerate(turn.content):
        at = (*place, "content", number)
        match turn.role, block:
            case _, {"type": "text", "text": str(text)}:
                texts.append(text)
            case "assistant", {
                "type": "tool_use",
                "id": str(name),
                "name": str(function),
                "input": dict(given),
            }:
                if deeper(given, MAX_DEPTH):
                    raise _wrong(
                        (*at, "input"), f"expected up to {MAX_DEPTH} objects and lists in each other"
                    )
                arguments = orjson.dumps(given).decode()
                calls.append(
                    {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}
                )
            case "user", {"type": "tool_result", "tool_use_id": str(name)}:
                yield at, {"role": "tool", "tool_call_id": name, "content": _result(block, at)}
            case _:
                raise _unknown(block, at)
    if texts or calls or not turn.content:
        message: Json = {"role": turn.role, "content": "".join(texts) or (None if calls else "")}
        yield place, message | ({"tool_calls": calls} if calls else {})


def _result(block: Json, place: Origin) -> str:
    """A tool's answer as text; that it was an error, its text has to say."""
    content = block.get("content") or ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong((*place, "content"), f"expected a text or a list of text blocks, got {shown(content)}")
    texts = []
    for number, part in enumerate(content):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise _unknown(part, (*place, "content", number))
    return "".join(texts)


def _unknown(block: Any, place: Origin) -> InvalidRequestError:
    kind = block.get("type") if isinstance(block, dict) else block
    return _wrong(
        place,
        "expected a text block, tool_use of an assistant with id, name and input, or tool_result of a user "
        f"with tool_use_id; a block of type {shown(kind)} is not supported yet",
    )


def _wrong(place: Origin, why: str) -> InvalidRequestError:
    where = ".".join(map(str, place))
    return InvalidRequestError(f"'{where}': {why}", param=where)
