"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from prefill_service.api.body import read_json
from prefill_service.api.context import Context
from prefill_service.api.openapi import body_of
from prefill_service.api.record import record_of
from prefill_service.api.respond import respond
from prefill_service.api.schemas import ChatRequest
from prefill_service.api.shapes import ChatShape
from prefill_service.api.validation import validate


def chat_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["generation"])
    shape = ChatShape()

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest), response_model=None)
    async def create_chat_completion(request: Request) -> Response:
        """Answers the last user message `n` times; `prompts` says how messages become a prompt."""
        wanted = validate(ChatRequest, await read_json(request, context.limits.max_body_bytes))
        target = context.admission.target(wanted)
        record_of(request).task = target.version.task if target.version else None
        admitted = await context.admission.chat(wanted, target)
        return await respond(context, request, wanted, admitted, shape)

    return router
