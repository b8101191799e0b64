"""The endpoints of OpenAI's responses."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from prefill_service.api.described import ANSWER, REFUSALS, body_schema
from prefill_service.api.intake import BEHIND_OTHERS, ApiLimits, client_of, noting, read_body
from prefill_service.api.outcomes import JsonResponse, record_of
from prefill_service.api.responses import EventStream
from prefill_service.protocols.chat import Chat, Json, chunks_of, said, shown_headers
from prefill_service.protocols.responses.answers import Answer, ResponseStream, fill
from prefill_service.protocols.responses.kept import KeptResponses
from prefill_service.protocols.responses.requests import ResponsesRequest

ResponseName = Annotated[str, Path(description="As `id` of the answer says it")]


def responses_routes(chat: Chat, limits: ApiLimits) -> APIRouter:
    router = APIRouter(tags=["responses"], responses=REFUSALS)
    kept = KeptResponses(limits.kept_answers_bytes)

    @router.post(
        "/v1/responses", response_model=None, responses=ANSWER, openapi_extra=body_schema(ResponsesRequest)
    )
    async def create_response(request: Request) -> Response:
        """OpenAI's newer way to chat: the same tasks, adapters and limits."""
        wanted, owner = await read_body(request, ResponsesRequest, limits), _owner(request)
        earlier: list[Json] = []
        if wanted.previous_response_id is not None:
            earlier = [*kept.find(wanted.previous_response_id, owner, "previous_response_id").messages]
        made = await chat.answer(request, wanted.as_chat(earlier, noting(request, limits)))
        keeps = kept.keeps and BEHIND_OTHERS not in request.scope  # a batch's answers lie in its files
        answer = Answer(wanted, record_of(request), stored=keeps and wanted.store is not False)

        def ended() -> None:
            if answer.stored:
                kept.keep(owner, answer.whole(), [*earlier, *wanted.said(), *answer.messages()])

        if isinstance(made, EventStream):
            return ResponseStream(answer, chunks_of(made), ended, shown_headers(made))
        fill(answer, said(made))
        ended()
        return JsonResponse(answer.whole(), headers=shown_headers(made))

    @router.get("/v1/responses/{name}")
    async def one_response(request: Request, name: ResponseName) -> Json:
        """An answer that is still kept."""
        return kept.find(name, _owner(request), "id").response

    @router.delete("/v1/responses/{name}")
    async def delete_response(request: Request, name: ResponseName) -> Json:
        """Forgets it; the conversations that went on from it keep what they need."""
        kept.delete(name, _owner(request))
        return {"id": name, "object": "response", "deleted": True}

    return router


def _owner(request: Request) -> str | None:
    client = client_of(request)
    return None if client is None else client.name
