"""What the API says of itself, in its OpenAPI document, beyond what FastAPI can know: bodies that endpoints
read themselves, and what is answered instead of an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from prad.http.described import SCHEMA, refusals


class Failure(BaseModel):
    """OpenAI's error object."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    """What was wrong, what was expected, and how to mend it."""
    type: str
    """invalid_request_error, rate_limit_error or server_error."""
    param: str | None
    """The field that it is about."""
    code: str | None
    """One word for programs."""


class FailureBody(BaseModel):
    """Every answer that is no 2xx."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    error: Failure
    """What went wrong."""


WHY_FAILED: Mapping[int | str, str] = {"default": "Not served, and why"}
WHY_REFUSED: Mapping[int | str, str] = {
    400: "A field is unknown, unsupported or wrong, the body is no JSON, or the prompt does not fit",
    401: "An API key is needed, and none that is in force is shown",
    403: "The key is not for this task, or the request's Host is none of the server's names",
    404: "No such task, version or model",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "Too much is waiting, or the key has used what it may; Retry-After says when to come again",
    503: "Not ready, or the decode service is away; Retry-After says when to come again",
    504: "It took longer than a request may",
}
FAILURES = refusals(WHY_FAILED, FailureBody)
REFUSALS = refusals(WHY_REFUSED, FailureBody)
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's object with `prad` beside it; events of chunks if `stream` is true",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {}},  # of its events, which schemas have no words for
        },
    }
}


_MESSAGES = [{"role": "user", "content": "name[Aromi], eatType[coffee shop]"}]
_EXAMPLES: dict[str, dict[str, Any]] = {
    "CompletionRequest": {"model": "e2e", "prompt": "name[Aromi], eatType[coffee shop]", "max_tokens": 32},
    "ChatRequest": {"model": "e2e", "messages": _MESSAGES, "stream": True},
    "TokenizeBody": {"model": "e2e", "prompt": "name[Aromi], eatType[coffee shop]"},
    "Detokenize": {"tokens": [1, 2, 3]},
    "MessagesRequest": {"model": "e2e", "messages": _MESSAGES, "max_tokens": 32},
    "TokensRequest": {"model": "e2e", "messages": _MESSAGES},
    "ResponsesRequest": {"model": "e2e", "input": "name[Aromi], eatType[coffee shop]"},
    "NewBatch": {"input_file_id": "file-1f2e", "endpoint": "/v1/completions", "completion_window": "24h"},
}
"""Of bodies, by their names."""


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """An operation's body, as the API describes it."""
    schema = {"$ref": SCHEMA.format(model=kind.__name__)}
    content = {"application/json": {"schema": schema, "example": _EXAMPLES[kind.__name__]}}
    return {"requestBody": {"required": True, "content": content}}


def form_schema(fields: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    """The same of a body in parts: schemas of its fields."""
    schema = {"type": "object", "required": [*required], "properties": {**fields}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def query_schema(**parameters: Mapping[str, Any]) -> dict[str, Any]:
    """An operation's query, which it reads itself: schemas of what may be in it, with descriptions."""
    return {
        "parameters": [
            {"name": name, "in": "query", "description": schema["description"], "schema": schema}
            for name, schema in parameters.items()
        ]
    }
