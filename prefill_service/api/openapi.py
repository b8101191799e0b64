"""The API's own description at /openapi.json. Bodies are read by us, so their schemas are added by hand."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from prefill_service.api.schemas import ChatRequest, CompletionRequest

_REF = "#/components/schemas/{model}"


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of an endpoint that reads a `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class DescribedApp(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            models: list[tuple[type[BaseModel], Any]] = [
                (CompletionRequest, "validation"),
                (ChatRequest, "validation"),
            ]
            _, definitions = models_json_schema(models, ref_template=_REF)
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(definitions["$defs"])
            self.openapi_schema = schema
        return self.openapi_schema
