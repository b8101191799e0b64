"""Refusals in an OpenAPI document: why a route answers with each status, and in which shape."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

SCHEMA = "#/components/schemas/{model}"


def refusals(reasons: Mapping[int | str, str], kind: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """`responses` of routes. The schema is named, and added by `with_schemas`: FastAPI would make validators
    of a model, for each status of each route anew, which are never asked and were most of what an app took to
    be made."""
    content = {"application/json": {"schema": {"$ref": SCHEMA.format(model=kind.__name__)}}}
    return {status: {"description": why, "content": content} for status, why in reasons.items()}


def with_schemas(
    app: FastAPI, kinds: Iterable[type[BaseModel]], mode: Literal["validation", "serialization"]
) -> dict[str, Any]:
    """What FastAPI says of `app`, with the schemas of models that it cannot know: named, as above, alone."""
    told = FastAPI.openapi(app)
    _, added = models_json_schema([(kind, mode) for kind in kinds], ref_template=SCHEMA)
    told["components"]["schemas"] |= added["$defs"]
    return told
