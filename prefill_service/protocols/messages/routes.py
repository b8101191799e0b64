"""The endpoints of Anthropic's messages, and how they word refusals."""

from typing import Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Scope, Send

from prad.http.described import refusals
from prefill_service.api.described import ANSWER, WHY_FAILED, WHY_REFUSED, Failure, body_schema
from prefill_service.api.intake import ApiLimits, noting, read_body
from prefill_service.api.outcomes import Face, JsonResponse, record_of
from prefill_service.api.responses import EventStream
from prefill_service.protocols.chat import Chat, chunks_of, said, shown_headers
from prefill_service.protocols.messages.answers import MessageStream, events_of, failure_of, message_of
from prefill_service.protocols.messages.requests import MessagesRequest, TokensRequest

MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"


class MessagesFailure(BaseModel):
    """Anthropic's error object; `param` and `code` are OpenAI's beside it."""

    type: Literal["error"]
    error: Failure
    request_id: str


class TokenCount(BaseModel):
    input_tokens: int


_REFUSALS = refusals({**WHY_FAILED, **WHY_REFUSED}, MessagesFailure)


def messages_routes(chat: Chat, limits: ApiLimits) -> APIRouter:
    router = APIRouter(tags=["generation"], responses=_REFUSALS)

    @router.post(MESSAGES, response_model=None, responses=ANSWER, openapi_extra=body_schema(MessagesRequest))
    async def create_message(request: Request) -> Response:
        """Anthropic's way to chat: the same tasks, adapters and limits."""
        wanted = await read_body(request, MessagesRequest, limits)
        answer, record = (
            await chat.answer(request, wanted.as_chat(noting(request, limits))),
            record_of(request),
        )
        headers = shown_headers(answer)
        if isinstance(answer, EventStream):
            return MessageStream(events_of(chunks_of(answer), record), record, headers)
        return JsonResponse(message_of(said(answer), record), headers=headers)

    @router.post(COUNT_TOKENS, openapi_extra=body_schema(TokensRequest))
    async def count_tokens(request: Request) -> TokenCount:
        """How many tokens the prompt has, in the task's template; nothing is computed."""
        wanted = await read_body(request, TokensRequest, limits)
        admitted = await chat.admit(request, wanted.as_chat(noting(request, limits)))
        (prompt,) = admitted.prompts
        return TokenCount(input_tokens=len(prompt.prompt_ids) + len(prompt.continuation_ids))

    return router


def messages_face(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """Refusals as Anthropic words them."""
    return scope, _Refusals(send).send


MESSAGES_FACE: dict[str, Face] = {MESSAGES: messages_face}


class _Refusals:
    """Puts what is no 2xx into Anthropic's words; everything else goes through untouched."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["request-id"] = headers["x-request-id"]
            if message["status"] >= 400:
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._refuse(self._start)
            return
        await self._send(message)

    async def _refuse(self, start: Message) -> None:
        headers = MutableHeaders(scope=start)
        body = orjson.dumps(failure_of(orjson.loads(self._body), start["status"], headers["x-request-id"]))
        headers["content-length"] = str(len(body))
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})
