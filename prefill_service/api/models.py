"""GET /v1/models: the plain model, and every task as vLLM lists LoRAs (`parent` is the base model's id)."""

import time

from fastapi import APIRouter

from prefill_service.api.context import Context
from prefill_service.api.targets import resolve, split_name
from prefill_service.generation import TaskVersion

Json = dict[str, object]


def models_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["models"])
    created = int(time.time())
    catalogue = context.catalogue

    def base() -> Json:
        return {
            "id": catalogue.base_name,
            "object": "model",
            "created": created,
            "owned_by": "prad",
            "root": catalogue.base_name,
            "parent": None,
            "max_model_len": context.model.max_context,
        }

    def adapted(name: str, version: TaskVersion, versions: tuple[int, ...]) -> Json:
        record = version.artefact.record
        return {
            **base(),
            "id": name,
            "root": version.digest,
            "parent": catalogue.base_name,
            "max_model_len": context.model.max_context - record.virtual_tokens,
            "prad": {
                "task": version.task,
                "version": version.version,
                "versions": list(versions),
                "digest": version.digest,
                "method": record.method,
                "task_tokens": list(record.task_tokens),
                "end_token": record.end_token,
                "generation": record.generation.model_dump(mode="json"),
                "description": record.description,
                "licence": record.licence,
            },
        }

    @router.get("/v1/models")
    async def list_models() -> Json:
        """Everything that `model` may name, tasks at their current version."""
        tasks = [adapted(task.name, task.current, task.versions) for task in catalogue.tasks()]
        return {"object": "list", "data": [base(), *tasks]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Json:
        """The plain model, a task, or one version of it as in e2e@3."""
        if name == catalogue.base_name:
            return base()
        task, number = split_name(name, "model")
        version = resolve(catalogue, task, number, "model")
        versions = next((entry.versions for entry in catalogue.tasks() if entry.name == task), ())
        return adapted(name, version, versions)

    return router
