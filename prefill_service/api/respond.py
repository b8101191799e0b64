"""The second half of both endpoints: start the engine, then answer in one piece or as a stream."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from prefill_service.api.admission import Admitted
from prefill_service.api.context import Context
from prefill_service.api.disconnect import while_connected
from prefill_service.api.generate import Delta, Generation
from prefill_service.api.logprobs import TokenScore
from prefill_service.api.record import record_of
from prefill_service.api.schemas import GenerationRequest
from prefill_service.api.shapes import Json, Shape
from prefill_service.api.stream import ChunkWriter, EventStream, chunks


async def respond(
    context: Context, request: Request, wanted: GenerationRequest, admitted: Admitted, shape: Shape
) -> Response:
    """Raises what the engine raises before its first token (streaming) or at all (in one piece)."""
    record = record_of(request)
    generation = Generation(context.engine, context.tokenizer, context.scorer, admitted, record)
    headers = _headers(admitted)
    shared: Json = {
        "id": admitted.id,
        "object": shape.chunk_object if wanted.stream else shape.whole_object,
        "created": admitted.created,
        "model": admitted.target.name,
        "system_fingerprint": context.model.short_fingerprint,
    }
    if wanted.stream:
        writer = ChunkWriter(shared, admitted.report(), usage_field=wanted.include_usage)
        events = chunks(generation.deltas(), shape, writer, record, include_usage=wanted.include_usage)
        return EventStream(events, record, headers)
    async with while_connected(request.receive):
        choices = await _gather(generation.deltas(), len(admitted.prompts) * admitted.choices)
    scored = admitted.effective.alternatives is not None
    whole = [
        shape.whole(i, "".join(c.texts), c.scores if scored else None, c.finish_reason)
        for i, c in enumerate(choices)
    ]
    body = {**shared, "choices": whole, "usage": record.usage(), "prad": admitted.report()}
    return JSONResponse(body, headers=headers)


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str = ""


async def _gather(deltas: AsyncGenerator[Delta, None], count: int) -> list[_Choice]:
    choices = [_Choice() for _ in range(count)]
    async with aclosing(deltas):
        async for delta in deltas:
            choice = choices[delta.index]
            choice.texts.append(delta.text)
            choice.scores.extend(delta.scores)
            choice.finish_reason = delta.finish_reason or choice.finish_reason
    return choices


def _headers(admitted: Admitted) -> dict[str, str]:
    version = admitted.target.version
    if version is None:
        return {}
    return {
        "x-prad-task": version.task,
        "x-prad-version": str(version.version),
        "x-prad-digest": version.digest,
    }
