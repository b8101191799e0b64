"""An admitted request's answer: in one piece, or as server-sent events while it is made.

engine.generate(prompt 0) ─ tokens ▶ ChoiceText per choice ─┐
engine.generate(prompt 1) ─ tokens ▶ ChoiceText per choice ─┴▶ deltas ▶ one answer, or events
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import ClassVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prad.core.sampling import ScoresEvent, TokenEvent
from prad.lm import Tokenizer
from prefill_service.api.admission import Admitted
from prefill_service.api.conversation import stream_behind
from prefill_service.api.outcomes import (
    CLIENT_GONE,
    ClientGoneError,
    JsonResponse,
    RequestRecord,
    client_error,
    error_body,
    record_of,
    while_connected,
)
from prefill_service.api.requests import GenerationRequest, Json, Shape, StreamOptions
from prefill_service.api.shadow import Shadows, Watched
from prefill_service.api.showing import Shown, stands_in_template
from prefill_service.api.text import ChoiceText, Delta, TokenScore, TokenScorer
from prefill_service.api.token_ids import TokenIds
from prefill_service.errors import InternalError, ServingError
from prefill_service.prompt import Engine, PromptRequest

DONE = b"data: [DONE]\n\n"
QUEUED_DELTAS = 64


class Responder:
    """Starts the engine for a request, and answers. `fingerprint`: the answers' system_fingerprint."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, fingerprint: str, shadows: Shadows) -> None:
        self._engine = engine
        self._shadows = shadows
        self._tokenizer = tokenizer
        self._scorer = TokenScorer(tokenizer)
        self._fingerprint = fingerprint

    async def respond(
        self, request: Request, wanted: GenerationRequest, admitted: Admitted, shape: Shape
    ) -> Response:
        """Raises what the engine raises before its first token (streaming) or at all (in one piece)."""
        record = record_of(request)
        record.prompt_tokens = sum(len(p.prompt_ids) + len(p.continuation_ids) for p in admitted.prompts)
        watched = None if admitted.target.shadow is None else self._shadows.watch(wanted, admitted)
        shown = None
        if wanted.shows_given:
            inside = stands_in_template(admitted.target.record, admitted.template)
            shown = Shown(wanted, self._tokenizer, self._scorer, inside=inside)
        deltas = self._deltas(admitted, record, watched, shown)
        shared: Json = {
            "id": admitted.id,
            "object": shape.chunk_object if wanted.stream else shape.whole_object,
            "created": admitted.created,
            "model": admitted.target.name,
            "system_fingerprint": self._fingerprint,
        }
        report: Json = {"prad": admitted.report()}
        ids = TokenIds(admitted, shape) if admitted.tells_ids else None
        if ids is not None:
            report |= ids.beside_choices
        if wanted.stream:
            writer = ChunkWriter(shared, report, record, wanted.stream_options or StreamOptions())
            return EventStream(chunks(deltas, shape, writer, ids), record, _headers(admitted))
        async with while_connected(request.receive):
            choices = await _gather(deltas, len(admitted.prompts) * admitted.choices)
        scored, given = wanted.alternatives is not None, list(enumerate(choices))
        if wanted.drawn > wanted.choices:
            given = _likeliest(given, wanted.drawn, wanted.choices)
        whole = [
            shape.whole(i, "".join(c.texts), c.scores if scored else None, c.finish_reason)
            for i, (_, c) in enumerate(given)
        ]
        if ids is not None:
            whole = [ids.added(w, drawn, c.ids) for w, (drawn, c) in zip(whole, given, strict=True)]
        body = {**shared, "choices": whole, "usage": record.usage(), **report}
        if shown is not None:
            shown.add_to(body, whole)
        return JsonResponse(body, headers=_headers(admitted))

    def _deltas(
        self, admitted: Admitted, record: RequestRecord, watched: Watched | None, shown: Shown | None
    ) -> AsyncGenerator[Delta, None]:
        """Settled text of every choice, in the order it happens; its tokens are noted in `record`, those of
        the first choice in `watched`. Closing it closes the engine's generators. Raises what they raise."""
        return _merged(
            [
                self._of_prompt(prompt, admitted, record, watched if number == 0 else None, shown)
                for number, prompt in enumerate(admitted.prompts)
            ]
        )

    async def _of_prompt(
        self,
        request: PromptRequest,
        admitted: Admitted,
        record: RequestRecord,
        watched: Watched | None,
        shown: Shown | None,
    ) -> AsyncGenerator[Delta, None]:
        running = {choice: self._choice_text(request, admitted, shown) for choice in range(request.choices)}
        unopened = shown
        async with aclosing(self._engine.generate(request)) as tokens:
            async for out in tokens:
                text = running.get(out.choice)
                if text is None:
                    continue  # was under way when its choice was cancelled
                if unopened is not None:
                    scores = out.scores if isinstance(out, ScoresEvent) else ()
                    for delta in await unopened.opening(request, scores, running):
                        yield delta
                    unopened = None
                    if isinstance(out, ScoresEvent):
                        continue
                if out.tokens:
                    record.count_token(out.cached_tokens)
                else:  # nothing is drawn
                    record.cached_tokens += out.cached_tokens
                delta = self._delta(request, out, text, told=admitted.tells_ids)
                if watched is not None and out.choice == 0:
                    watched.note(out.tokens[0].id, last=delta.finish_reason is not None)
                if delta.finish_reason is not None:
                    del running[out.choice]
                    record.stopped_by = text.scanner.found
                if delta.text or delta.scores or delta.ids or delta.finish_reason is not None:
                    yield delta
                if delta.finish_reason is not None and out.finish_reason is None:
                    self._engine.cancel_choice(request.request_id, out.choice)
                    if not running:
                        return
        if running:
            raise InternalError("the engine ended before the output did")

    def _choice_text(self, request: PromptRequest, admitted: Admitted, shown: Shown | None) -> ChoiceText:
        behind = None if shown is None else shown.stream_behind(request, admitted.shown)
        if admitted.goes_on:
            given = request.prompt_ids + request.continuation_ids
            behind = stream_behind(self._tokenizer, given, admitted.shown)
        return ChoiceText(
            behind or self._tokenizer.stream(admitted.shown),
            admitted.stop,
            strip_space=request.version is not None and behind is None,
            min_tokens=request.sampling.min_tokens,
            keep_stop=admitted.keep_stop,
        )

    def _delta(self, request: PromptRequest, out: TokenEvent, text: ChoiceText, *, told: bool) -> Delta:
        index = request.prompt_index * request.choices + out.choice
        if not out.tokens:
            return Delta(index, "", (), out.finish_reason)
        scored = request.sampling.logprobs is not None
        scores = (self._scorer.score(out.tokens[0], text.length),) if scored else ()
        settled, finish_reason = text.settle(out)
        ids = tuple(token.id for token in out.tokens) if told else ()
        return Delta(index, settled, scores, finish_reason, ids)


@dataclass(frozen=True, slots=True)
class _Ended:
    error: Exception | None = None


async def _merged(sources: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """All sources at once; the first error ends all of them.

    Tasks by hand: a TaskGroup belongs to the task that entered it, and must not stay open across a yield.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for delta in only:
                yield delta
        return
    queue: asyncio.Queue[Delta | _Ended] = asyncio.Queue(QUEUED_DELTAS)
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Delta):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: AsyncGenerator[Delta, None], queue: "asyncio.Queue[Delta | _Ended]") -> None:
    try:
        async with aclosing(source):
            async for delta in source:
                await queue.put(delta)
    except Exception as error:
        await queue.put(_Ended(error))
    else:
        await queue.put(_Ended())


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


async def _gather(deltas: AsyncGenerator[Delta, None], count: int) -> list[_Choice]:
    choices = [_Choice() for _ in range(count)]
    async with aclosing(deltas):
        async for delta in deltas:
            choice = choices[delta.index]
            choice.texts.append(delta.text)
            choice.scores.extend(delta.scores)
            choice.ids.extend(delta.ids)
            choice.finish_reason = delta.finish_reason or choice.finish_reason
    return choices


def _likeliest(drawn: Sequence[tuple[int, _Choice]], each: int, given: int) -> list[tuple[int, _Choice]]:
    """Of each prompt's `each` answers the `given` ones with the highest log-probability per token, the best
    first."""

    def worth(numbered: tuple[int, _Choice]) -> float:
        scores = [score.logprob or 0.0 for score in numbered[1].scores]
        return sum(scores) / max(1, len(scores))

    prompts = [drawn[start : start + each] for start in range(0, len(drawn), each)]
    return [best for its in prompts for best in sorted(its, key=worth, reverse=True)[:given]]


def _headers(admitted: Admitted) -> dict[str, str]:
    version = admitted.target.version
    if version is None:
        return {}
    return {
        "x-prad-task": version.task,
        "x-prad-version": str(version.version),
        "x-prad-digest": version.digest,
        "x-prad-routing": str(admitted.target.routing),
    }


class ChunkWriter:
    """Writes chunks; what they share is serialised once. `report`: what the first one says beside that.

    With `include_usage` every chunk has the field `usage`: so far, or null in all but the last.
    """

    def __init__(self, shared: Json, report: Json, record: RequestRecord, options: StreamOptions) -> None:
        self._shared = shared
        self._head = b"data: " + orjson.dumps(shared)[:-1] + b',"choices":['
        self._report = b"," + orjson.dumps(report)[1:-1]
        self._record = record
        self._usage = bool(options.include_usage)
        self._so_far = self._usage and bool(options.continuous_usage_stats)

    def chunk(self, choice: Json, *, first: bool) -> bytes:
        """The stream's first chunk also says which adapter answers."""
        parts = [self._head, orjson.dumps(choice), b"]"]
        if self._usage:
            parts += [b',"usage":', orjson.dumps(self._record.usage()) if self._so_far else b"null"]
        if first:
            parts.append(self._report)
        return b"".join((*parts, b"}\n\n"))

    def last(self) -> bytes:
        """Behind all choices; empty if nobody asked for it."""
        if not self._usage:
            return b""
        return _event({**self._shared, "choices": [], "usage": self._record.usage()})


async def chunks(
    deltas: AsyncGenerator[Delta, None], shape: Shape, writer: ChunkWriter, ids: TokenIds | None = None
) -> AsyncGenerator[bytes, None]:
    """All events but [DONE]."""
    opened: set[int] = set()
    async with aclosing(deltas):
        async for delta in deltas:
            event = b""
            first = not opened
            if delta.index not in opened:
                opened.add(delta.index)
                if opening := shape.opening(delta.index):
                    event, first = writer.chunk(opening, first=first), False
            if (choice := shape.chunk(delta)) is not None:
                if ids is not None:
                    choice = ids.added(choice, delta.index, list(delta.ids))
                event += writer.chunk(choice, first=first)
            if event:
                yield event
    if last := writer.last():
        yield last


class EventStream(Response):
    """Sends `events` as they come.

    What fails before the first event is an ordinary error response; later it is the last event, and no [DONE]
    follows: that says that the answer is whole, and many clients look for nothing else. The client's leaving
    closes `events`.
    """

    media_type = "text/event-stream"
    done: ClassVar[bytes] = DONE

    def __init__(
        self, events: AsyncGenerator[bytes, None], record: RequestRecord, headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with while_connected(receive), aclosing(self.events):
                async for event in self.events:
                    if not started:
                        started = True
                        await self._start(send)
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except ClientGoneError:
            if not started:
                raise
            self._record.status = CLIENT_GONE
            return
        except Exception as error:
            if not started:
                raise
            told = client_error(error, self._record)
            self._record.status = told.status
            await send({"type": "http.response.body", "body": self.broken(told), "more_body": False})
            return
        if not started:
            await self._start(send)
        await send({"type": "http.response.body", "body": self.done, "more_body": False})

    def broken(self, told: ServingError) -> bytes:
        """The last event of a stream that fails."""
        return _event(error_body(told))

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


def _event(data: Mapping[str, object]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"
