"""The engine behind the HTTP face: schedule -> run -> deliver.

schedule   choose the chunks of the next pass, reserve room at decode for prompts that begin (Open)
run        one packed prompt pass in the computing thread; its layers go out while it runs, or behind it
deliver    first tokens to the client and, with Commit, to decode; later ones come from decode
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from functools import partial

from kvtransfer.client import DecodeClient
from kvtransfer.layout import Encoding
from kvtransfer.sender import HandOff
from prad.adapters import Adapter, AdapterError
from prad.core.blocks import BlockPool
from prad.core.tokens import TokenEvent
from prad.lm import LanguageModel
from prad.lm.paged import Pools, blocks_in
from prefill_service.beams import beam_search
from prefill_service.chunks import Chunk, PrefixLookups, Waiting
from prefill_service.decode_link import DecodeLink, NoRoomError, event_error
from prefill_service.errors import (
    DeadlineError,
    DecodeUnavailableError,
    InternalError,
    OverloadedError,
    ServingError,
)
from prefill_service.generation import PromptRequest
from prefill_service.hand_over import HandOver, send_cached
from prefill_service.job import Job, Stage, deliver_first_tokens
from prefill_service.passes import PassRunner, a_core_is_left
from prefill_service.prompt_pass import PassItem
from prefill_service.residents import Residents
from prefill_service.scheduler import PromptScheduler
from prefill_service.settings import PrefillSettings

logger = logging.getLogger(__name__)

_BLOCKS_PINNED_S = 0.002
_GATHER_MOST_S = 0.1


class PrefillEngine:
    """Implements `prefill_service.generation.Engine`. Use `run()` as a task beside the HTTP server."""

    def __init__(
        self, model: LanguageModel, residents: Residents, client: DecodeClient, settings: PrefillSettings
    ) -> None:
        self._residents = residents
        self._queue_timeout = settings.queue_timeout_s
        self._request_timeout = settings.request_timeout_s
        self._yield_s = settings.yield_s
        self._gather_s = settings.gather_s
        self._encoding = Encoding[settings.kv_wire.upper()]
        size = settings.block_size
        working, kept = (
            blocks_in(model.layout, size, mib) for mib in (settings.chunked_kv_mib, settings.prefix_cache_mib)
        )
        self._pools = Pools(model.layout, working + kept, size, str(model.device), model.kernels)
        overlap = a_core_is_left(model) if settings.kv_overlap == "auto" else settings.kv_overlap == "yes"
        self._passes = PassRunner(model, self._pools, self._encoding, overlap=overlap, nice=settings.nice)
        self.blocks = BlockPool(working + kept, size, keep=kept)
        self._scheduler: PromptScheduler[Job] = PromptScheduler(
            self.blocks,
            pass_tokens=settings.pass_tokens,
            chunk_tokens=settings.chunk_tokens,
            pass_prompts=settings.pass_prompts,
            max_waiting=settings.max_waiting,
        )
        self._link = DecodeLink(client, model.spec, self._on_event, self._on_lost)
        self._live: dict[str, Job] = {}
        self._arrived = asyncio.Event()
        self._arrivals = 0
        self._decode_full = False
        self._hand_overs: dict[Job, HandOver] = {}

    @property
    def trouble(self) -> str | None:
        """Why no request can be served now; None if all is well."""
        return self._link.trouble

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return len(self._scheduler)

    @property
    def lookups(self) -> PrefixLookups:
        """What the prefix cache was good for."""
        return self._scheduler.lookups

    @property
    def live(self) -> int:
        """Prompts anywhere between arrival and last token."""
        return len(self._live)

    async def run(self) -> None:
        """Serves until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._link.run())
                tasks.create_task(self._loop())
        finally:
            self._passes.close()

    def generate(self, request: PromptRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        deadline = time.monotonic() + self._request_timeout
        return self._tokens(request, deadline) if request.beams is None else self._search(request, deadline)

    async def _search(self, request: PromptRequest, deadline: float) -> AsyncGenerator[TokenEvent, None]:
        async with self._pinned(request):  # from the first step to the last
            steps = beam_search(partial(self._tokens, deadline=deadline), request)
            async with aclosing(steps) as tokens:
                async for output in tokens:
                    yield output

    def _pinned(self, request: PromptRequest) -> AbstractAsyncContextManager[Adapter | None]:
        version = request.version
        return nullcontext() if version is None else self._residents.pinned(version.artefact)

    async def _tokens(self, request: PromptRequest, deadline: float) -> AsyncGenerator[TokenEvent, None]:
        if self._link.trouble is not None:
            raise DecodeUnavailableError(self._link.trouble)
        async with self._pinned(request) as adapter:
            if self._scheduler.full and not request.continuation_ids:  # what is under way is not refused
                raise OverloadedError(f"{len(self._scheduler)} prompts are waiting already")
            self._arrivals += 1
            now = time.monotonic()
            job = Job(PassItem(request, adapter), now, deadline)
            self._live[request.request_id] = job
            keys = job.item.keys(self.blocks.block_size) if self.blocks.caching else ()
            self._scheduler.add(Waiting(job, len(job.item.ids), keys, job.item.whole))
            self._arrived.set()
            try:
                # the adapter stays pinned until the first token: after the prompt pass nobody needs it
                async with asyncio.timeout(deadline - now):
                    output = await job.outputs.get()
            except TimeoutError:
                self._release(job)
                raise DeadlineError(f"no token within {self._request_timeout:g} s") from None
            except BaseException:
                self._release(job)
                raise
        try:
            while True:
                if isinstance(output, ServingError):
                    raise output
                if output.finish_reason is not None:
                    job.running.discard(output.choice)
                    if not job.running:
                        job.stage = Stage.FINISHED  # decode has freed it already
                yield output
                if not job.running:
                    return
                output = await job.outputs.get()
        finally:
            self._release(job)

    def cancel_choice(self, request_id: str, choice: int) -> None:
        """See `Engine.cancel_choice`."""
        job = self._live.get(request_id)
        if job is None:
            return
        job.running.discard(choice)
        if job.stage is Stage.DECODING:
            self._link.cancel(request_id, job.attempt, choice)

    async def probe(self, item: PassItem) -> None:
        """Runs one prompt through the model without handing it over.

        Raises AdapterError if its logits are not finite, or what the forward raises.
        """
        if await self._passes.probe(item) is None:
            raise AdapterError("with this adapter the logits are not finite")

    # ---- the loop ------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        while True:
            chunks = await self._schedule()
            if chunks:
                await self._run(chunks)
                if self._yield_s and any(job.stage is Stage.DECODING for job in self._live.values()):
                    await asyncio.sleep(self._yield_s)

    async def _schedule(self) -> list[Chunk[Job]]:
        await self._wait_for_work()
        await self._gather()
        chunks = self._scheduler.next_pass(time.monotonic())
        if not chunks:  # the oldest prompt waits for blocks that are still being sent
            await asyncio.sleep(_BLOCKS_PINNED_S)
        scheduled: list[Chunk[Job]] = []
        refused = False
        for chunk, room in zip(chunks, await self._open_all(chunks), strict=True):
            job = chunk.job
            if job.stage is Stage.FINISHED:  # the client left meanwhile, or decode refused for good
                if isinstance(room, HandOff):
                    await room.abort("cancelled")
                self._scheduler.remove(job)
                self._scheduler.put_back(chunk)
            elif isinstance(room, NoRoomError):
                refused = True
                self._scheduler.put_back(chunk, time.monotonic() + room.retry_after)
            elif refused and chunk.is_first:  # whoever came later waits behind the first refused
                if room is not None:
                    await room.abort("an earlier prompt goes first")
                    job.attempt += 1
                self._scheduler.put_back(chunk)
            else:
                if chunk.is_first:
                    await self._begin(chunk, room)
                scheduled.append(chunk)
        return scheduled

    async def _begin(self, chunk: Chunk[Job], room: HandOff | None) -> None:
        """The prompt has room at decode, or needs none. Its cached blocks go out first."""
        job = chunk.job
        job.stage = Stage.PREFILLING
        job.cached = chunk.prompt.cached
        if room is None:
            return
        hand_over = self._hand_overs[job] = HandOver(job, room, self._link)
        hand_over.task.add_done_callback(lambda _: self._hand_overs.pop(job))
        if job.cached:
            blocks = chunk.prompt.table[: job.cached // self.blocks.block_size]
            try:
                await send_cached(hand_over, self._pools, blocks, self._encoding)
            except Exception:
                logger.exception("sending the cached blocks of %s failed", job.request.request_id)
                job.fail(InternalError("the hand-off failed; the server's log says why"))

    async def _open_all(self, chunks: Sequence[Chunk[Job]]) -> list[HandOff | NoRoomError | None]:
        """All at once; but one by one up to the first refusal while decode is full: what is opened behind a
        refused one has to be given back."""
        opened: list[HandOff | NoRoomError | None] = []
        if not self._decode_full:
            opened = await asyncio.gather(*(self._open(chunk.job) for chunk in chunks))
        while len(opened) < len(chunks) and not isinstance((opened or [None])[-1], NoRoomError):
            opened.append(await self._open(chunks[len(opened)].job))
        self._decode_full = any(isinstance(room, NoRoomError) for room in opened)
        return opened + [None] * (len(chunks) - len(opened))

    async def _open(self, job: Job) -> HandOff | NoRoomError | None:
        """The hand-off; None if none is needed or the job has ended; NoRoomError if it has to wait."""
        if job.stage is not Stage.QUEUED or not job.needs_decode:
            return None
        try:
            adapter = job.item.adapter
            widths = {} if adapter is None else adapter.state_widths
            return await self._link.open(job.request, job.attempt, job.deadline_unix_ms, widths)
        except NoRoomError as full:
            if time.monotonic() - job.enqueued < self._queue_timeout:
                return full
            job.fail(OverloadedError(f"no room for this request within {self._queue_timeout:g} s"))
        except ServingError as error:
            job.fail(error)
        except Exception:
            logger.exception("opening the hand-off of %s failed", job.request.request_id)
            job.fail(InternalError("the hand-off could not be opened; the server's log says why"))
        return None

    async def _run(self, chunks: list[Chunk[Job]]) -> None:
        try:
            draws = await self._passes.run(chunks, self._hand_overs)
        except Exception:
            logger.exception("a prompt pass of %d prompts failed", len(chunks))
            self._scheduler.failed()
            for chunk in chunks:
                chunk.job.fail(InternalError("the prompt pass failed; the server's log says why"))
            return
        broken = {c.job for c in chunks if c.is_last and draws[c.job.item] is None}
        self._scheduler.computed(broken)
        for chunk in chunks:
            if chunk.is_last and not chunk.job.needs_decode:
                deliver_first_tokens(chunk.job, draws[chunk.job.item])

    async def _wait_for_work(self) -> None:
        """Returns when the head of the queue may run."""
        while True:
            due = self._scheduler.next_due()
            if due is not None and due <= time.monotonic():
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(None if due is None else due - time.monotonic()):
                    await self._arrived.wait()
            except TimeoutError:
                return

    async def _gather(self) -> None:
        """Returns when no prompt came for a moment, or there are enough for a pass.

        A moment in which the event loop was busy does not count: more prompts may lie in it unread.
        """
        now = time.monotonic()
        longest = now + _GATHER_MOST_S
        while self._gather_s and now < longest and not self._scheduler.fills_a_pass(now):
            known = self._arrivals
            await asyncio.sleep(self._gather_s)
            late = time.monotonic() - now - self._gather_s
            if known == self._arrivals and late < self._gather_s:
                return
            now = time.monotonic()

    # ---- tokens and losses -----------------------------------------------------------------------------

    def _on_event(self, event: TokenEvent) -> None:
        job = self._live.get(event.request_id)
        if job is None or job.stage is Stage.FINISHED:
            return
        for output in event.each():
            job.outputs.put_nowait(output)
        if event.is_early_end or not event.tokens:
            self._link.cancel(event.request_id, event.attempt)
            job.fail(event_error(event))

    def _on_lost(self, trouble: str) -> None:
        for job in list(self._live.values()):
            if job.stage in (Stage.COMMITTING, Stage.DECODING):
                job.fail(DecodeUnavailableError(f"the decode service was lost in mid-stream: {trouble}"))

    def _release(self, job: Job) -> None:
        """Forgets a job, whatever stage it is in, and frees what it holds on both sides."""
        if self._live.get(job.request.request_id) is job:
            del self._live[job.request.request_id]
        if job.stage is Stage.DECODING:
            self._link.cancel(job.request.request_id, job.attempt)
        self._scheduler.remove(job)
        job.stage = Stage.FINISHED
        if (hand_over := self._hand_overs.get(job)) is not None:
            hand_over.give_up()
