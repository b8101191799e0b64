"""What a request's fields may be: one base for all that clients send, and a type for each form of value.

Clients send many fields at the value that means "off". Those are taken for what they are; any other value of
a feature that is not there is refused by the feature's name: nobody gets an answer that ignored a wish.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from prad.artefact import MAX_STOP_CHARACTERS, MAX_STOPS

MAX_FIELDS = 100
"""Fields of one object: each unknown one would be an error of its own."""
SHOWN_CHARACTERS = 60

Neutral = Mapping[str, tuple[object, ...]]

PromptInput = str | tuple[int, ...]
"""One prompt: text, or token ids that are taken as they are."""


class StrictModel(BaseModel):
    """Base of everything a client sends: "5" is not 5, true is not 1, unknown fields are refused.

    `unsupported` maps a feature's field to the values that leave it off (null always does); `ignored` holds
    fields that are accepted because they cannot change a result.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    unsupported: ClassVar[Neutral] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise expected(f"up to {MAX_FIELDS} fields", len(data))
        for name, neutral in cls.unsupported.items():
            value = data.get(name)
            if value is not None and not any(_same(value, n) for n in neutral):
                raise refused(
                    name,
                    f"'{name}' is not supported yet"
                    + (f" (only {shown(neutral[0])} is accepted)" if neutral else ""),
                )
        return {k: v for k, v in data.items() if k not in cls.unsupported and k not in cls.ignored}


def refused(field: str, why: str) -> PydanticCustomError:
    """The error of a check that looks at several fields; `field` is to blame."""
    return PydanticCustomError("refused", "{why}", {"field": field, "why": why})


def expected(what: str, value: object) -> PydanticCustomError:
    """The error of a hand-written check: `what` should have been there instead of `value`."""
    return PydanticCustomError("expected", "{what}", {"what": f"expected {what}, got {shown(value)}"})


def shown(value: object) -> str:
    """As JSON, cut: of a long list or a deep nesting only the beginning is written at all."""
    text = ""
    for part in _JSON.iterencode(value):
        text += part[: SHOWN_CHARACTERS + 1]
        if len(text) > SHOWN_CHARACTERS:
            return f"{text[:SHOWN_CHARACTERS]}…"
    return text


_JSON = json.JSONEncoder(ensure_ascii=False)


def _same(value: object, neutral: object) -> bool:
    """Equality as JSON has it: 0 equals 0.0, but false does not equal 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


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
    """A message's text; text parts are joined as they stand, and `cache_control` changes no result."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise expected("a text or a list of text parts", value)
    texts = []
    for part in value:
        match part:
            case {"type": "text", "text": str(text), **more} if more.keys() <= {"cache_control"}:
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
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
    ),
]
_FROM_MINUS_1 = WithJsonSchema({"anyOf": [{"type": "integer", "minimum": -1}, {"type": "null"}]})
TopK = Annotated[int | None, PlainValidator(_top_k), _FROM_MINUS_1]
Truncation = Annotated[int | None, PlainValidator(_truncate), _FROM_MINUS_1]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenCount = Annotated[int, Field(ge=1)]
Logprobs = Annotated[int, Field(ge=0, le=20)]
Choices = Annotated[int, Field(ge=1, le=16)]
