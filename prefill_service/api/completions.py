"""POST /v1/completions."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from prefill_service.api.body import read_json
from prefill_service.api.context import Context
from prefill_service.api.openapi import body_of
from prefill_service.api.record import record_of
from prefill_service.api.respond import respond
from prefill_service.api.schemas import CompletionRequest
from prefill_service.api.shapes import CompletionShape
from prefill_service.api.validation import validate


def completions_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["generation"])
    shape = CompletionShape()

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest), response_model=None)
    async def create_completion(request: Request) -> Response:
        """Completes each prompt `n` times, with a task's adapter on the prompt if one is named."""
        wanted = validate(CompletionRequest, await read_json(request, context.limits.max_body_bytes))
        target = context.admission.target(wanted)
        record_of(request).task = target.version.task if target.version else None
        admitted = await context.admission.completion(wanted, target)
        return await respond(context, request, wanted, admitted, shape)

    return router
