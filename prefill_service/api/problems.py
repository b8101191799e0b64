"""What is wrong with something that was sent, in words: the field, the fault, what was there instead."""

import json
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from prefill_service.errors import InvalidRequestError

SHOWN_PROBLEMS = 3
TOLD_CHARACTERS = 1000
"""Of every text in an error: what a client sent may be quoted there."""
NAMED_CHARACTERS = 200
"""Of a field's name among them."""
SHOWN_CHARACTERS = 60
"""Of a value that was not expected."""


def invalid_request(
    problems: Sequence[Mapping[str, Any]], known: Collection[str] = ()
) -> InvalidRequestError:
    """pydantic's errors as one: messages name the field, the fault and what was expected. `known`: the fields
    that there are, where they are to be told."""
    return InvalidRequestError(
        "; ".join(cut(_describe(p, known)) for p in problems[:SHOWN_PROBLEMS]),
        param=_field(problems[0]),
        quotes=True,
    )


def shown(value: object) -> str:
    """As JSON, cut: of a long list or a deep nesting only the beginning is written at all."""
    text = ""
    for part in _JSON.iterencode(value):
        text += part[: SHOWN_CHARACTERS + 1]
        if len(text) > SHOWN_CHARACTERS:
            return f"{text[:SHOWN_CHARACTERS]}…"
    return text


_ELSEWHERE = (("prompt", "messages", "/v1/completions"), ("messages", "prompt", "/v1/chat/completions"))
"""Which are taken for each other: a field, what there is instead, where it belongs."""
_JSON = json.JSONEncoder(ensure_ascii=False)


def _describe(problem: Mapping[str, Any], known: Collection[str]) -> str:
    field, message = _field(problem), problem["msg"]
    subject = "the body" if field is None else f"'{cut(field, NAMED_CHARACTERS)}'"
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown field {subject}{_meant(problem['loc'], known)}"
        case "missing":
            return f"field {subject} is required"
        case "refused":
            return str(message)
        case "value_error":
            return str(message).removeprefix("Value error, ")
        case "expected":
            return f"{subject}: {message}"
        case "model_type" | "model_attributes_type":
            return f"{subject}: expected an object, got {shown(problem['input'])}"
    return f"{subject}: {message[0].lower()}{message[1:]}, got {shown(problem['input'])}"


def _meant(place: Sequence[object], known: Collection[str]) -> str:
    """Instead of a field that there is not."""
    if not known or len(place) != 1:
        return ""
    for field, ours, theirs in _ELSEWHERE:
        if place[0] == field and ours in known:
            return f": '{field}' is for {theirs}, here it is '{ours}'"
    near = get_close_matches(str(place[0])[:NAMED_CHARACTERS], known, 1)
    return f": did you mean '{near[0]}'?" if near else ": /docs lists those that there are"


def _field(problem: Mapping[str, Any]) -> str | None:
    parts = [str(part) for part in problem["loc"]]
    if problem["type"] == "refused":
        parts.append(str(problem["ctx"]["field"]))
    return ".".join(parts) or None


def cut(text: str, most: int = TOLD_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
