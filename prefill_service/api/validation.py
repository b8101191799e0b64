"""From a JSON object to a request model; messages name the field, the fault and what was expected.

Clients send many fields at the value that means "off". Those are taken for what they are; any other value of
a feature that is not there is refused by the feature's name: nobody gets an answer that ignored a wish.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from prefill_service.errors import InvalidRequestError

SHOWN_PROBLEMS = 3
SHOWN_CHARACTERS = 60

Neutral = Mapping[str, tuple[object, ...]]


class StrictModel(BaseModel):
    """Base of everything a client sends: "5" is not 5, true is not 1, unknown fields are refused.

    `unsupported` maps a feature's field to the values that leave it off (null always does); `ignored` holds
    fields that are accepted because they cannot change a result.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    unsupported: ClassVar[Neutral] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in cls.unsupported.items():
            value = data.get(name)
            if value is not None and not any(_same(value, n) for n in neutral):
                raise PydanticCustomError(
                    "unsupported",
                    "'{field}' is not supported yet{hint}",
                    {"field": name, "hint": f" (only {_show(neutral[0])} is accepted)" if neutral else ""},
                )
        return {k: v for k, v in data.items() if k not in cls.unsupported and k not in cls.ignored}


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: object) -> Model:
    """`data` as `model`. Raises InvalidRequestError."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise InvalidRequestError(
            "; ".join(_describe(p) for p in problems[:SHOWN_PROBLEMS]), param=_field(problems[0])
        ) from error


def refused(field: str, why: str) -> PydanticCustomError:
    """The error of a check that looks at several fields; `field` is to blame."""
    return PydanticCustomError("unsupported", "{why}", {"field": field, "why": why})


def expected(what: str, value: object) -> PydanticCustomError:
    """The error of a hand-written check: `what` should have been there instead of `value`."""
    return PydanticCustomError("expected", "{what}", {"what": f"expected {what}, got {_show(value)}"})


def _describe(problem: ErrorDetails) -> str:
    field, message = _field(problem), problem["msg"]
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown field '{field}'"
        case "missing":
            return f"field '{field}' is required"
        case "unsupported":
            return message
        case "value_error":
            return message.removeprefix("Value error, ")
        case "expected":
            return f"'{field}': {message}"
        case "model_type":
            return (
                f"{f'{field!r}' if field else 'the body'}: expected an object, got {_show(problem['input'])}"
            )
    return f"'{field}': {message[0].lower()}{message[1:]}, got {_show(problem['input'])}"


def _field(problem: ErrorDetails) -> str | None:
    parts = [str(part) for part in problem["loc"]]
    if problem["type"] == "unsupported":
        parts.append(str(problem["ctx"]["field"]))
    return ".".join(parts) or None


def _same(value: object, neutral: object) -> bool:
    """Equality as JSON has it: 0 equals 0.0, but false does not equal 0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
