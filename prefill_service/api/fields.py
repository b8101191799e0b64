"""The fields of a request that may take several forms in JSON, each brought to one form here."""

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from prefill_service.api.validation import expected

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000

PromptInput = str | tuple[int, ...]
"""One prompt: text, or token ids that are taken as they are."""


def _prompts(value: Any) -> tuple[PromptInput, ...]:
    """A text, a list of texts, a list of ids or a list of lists of ids, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise expected("a text, a list of texts, a list of token ids or a list of those", value)
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(type(item) is int for item in value):
        return (tuple(value),)
    if all(isinstance(item, list) for item in value):
        for ids in value:
            if not all(type(token) is int for token in ids):
                raise expected("whole numbers as token ids", ids)
        return tuple(tuple(ids) for ids in value)
    raise expected("all texts, all token ids or all lists of token ids", value)


def _stops(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise expected(f"a non-empty text or a list of up to {MAX_STOPS} of them", value)
    if len(stops) > MAX_STOPS:
        raise expected(f"up to {MAX_STOPS} stop texts", len(stops))
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise expected(f"stop texts of up to {MAX_STOP_CHARACTERS} characters", max(map(len, stops)))
    return tuple(stops)


def _content(value: Any) -> str:
    """A message's text; text parts are joined as they stand."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise expected("a text or a list of text parts", value)
    texts = []
    for part in value:
        match part:
            case {"type": "text", "text": str(text)} if len(part) == 2:
                texts.append(text)
            case _:
                raise expected('{"type": "text", "text": …}, as only text is supported yet', part)
    return "".join(texts)


def _top_k(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not -1 <= value < 2**31:
        raise expected("a whole number of at least 1, or 0 or -1 to switch it off", value)
    return max(value, 0)


def _truncate(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or (value < 1 and value != -1):
        raise expected("a whole number of at least 1, or -1 to keep what fits", value)
    return int(value)


_TEXTS = {"type": "array", "items": {"type": "string"}}
_IDS = {"type": "array", "items": {"type": "integer"}}

Prompts = Annotated[
    tuple[PromptInput, ...],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]}),
]
Stops = Annotated[
    tuple[str, ...] | None,
    PlainValidator(_stops),
    WithJsonSchema({"anyOf": [{"type": "string"}, {**_TEXTS, "maxItems": MAX_STOPS}, {"type": "null"}]}),
]
Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]
TopK = Annotated[int | None, PlainValidator(_top_k), WithJsonSchema({"type": "integer", "minimum": -1})]
Truncation = Annotated[
    int | None, PlainValidator(_truncate), WithJsonSchema({"type": "integer", "minimum": -1})
]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenCount = Annotated[int, Field(ge=1)]
Logprobs = Annotated[int, Field(ge=0, le=20)]
Choices = Annotated[int, Field(ge=1, le=16)]
