"""The engine behind the HTTP face: schedule -> run -> deliver.

schedule   take prompts off the queue, reserve room for each at decode (Open)
run        one packed prompt pass in the computing thread; its layers go out while it runs
deliver    first tokens to the client and, with Commit, to decode; later ones come from decode
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate

from kvtransfer.client import DecodeClient
from kvtransfer.layout import Encoding
from kvtransfer.messages import TokenEvent
from kvtransfer.sender import HandOff, PassRows
from prad.adapters import AdapterError
from prad.lm import LanguageModel
from prefill_service.decode_link import DecodeLink, NoRoomError, event_error
from prefill_service.errors import (
    DeadlineError,
    DecodeUnavailableError,
    InternalError,
    OverloadedError,
    ServingError,
)
from prefill_service.generation import PromptRequest, TokenOut
from prefill_service.job import Job, Stage, deliver_first_tokens, hand_over
from prefill_service.layers import PassLayers
from prefill_service.prompt_pass import PassItem, run_prompt_pass
from prefill_service.residents import Residents
from prefill_service.scheduler import PromptScheduler, Waiting
from prefill_service.settings import PrefillSettings
from prefill_service.wire import model_spec, token_out

logger = logging.getLogger(__name__)

Scheduled = list[tuple[Job, HandOff | None]]


class PrefillEngine:
    """Implements `prefill_service.generation.Engine`. Use `run()` as a task beside the HTTP server."""

    def __init__(
        self, model: LanguageModel, residents: Residents, client: DecodeClient, settings: PrefillSettings
    ) -> None:
        self._model = model
        self._residents = residents
        self._queue_timeout = settings.queue_timeout_s
        self._request_timeout = settings.request_timeout_s
        self._encoding = Encoding[settings.kv_wire.upper()]
        self._scheduler: PromptScheduler[Job] = PromptScheduler(
            pass_tokens=settings.pass_tokens,
            pass_prompts=settings.pass_prompts,
            max_waiting=settings.max_waiting,
        )
        self._link = DecodeLink(client, model_spec(model.fingerprint), self._on_event, self._on_lost)
        self._live: dict[str, Job] = {}
        self._arrived = asyncio.Event()
        self._computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompt-pass")
        self._hand_overs: set[asyncio.Task[None]] = set()

    @property
    def trouble(self) -> str | None:
        """Why no request can be served now; None if all is well."""
        return self._link.trouble

    @property
    def waiting(self) -> int:
        """Prompts in the queue."""
        return len(self._scheduler)

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
            self._computing.shutdown(wait=False, cancel_futures=True)

    async def generate(self, request: PromptRequest) -> AsyncGenerator[TokenOut, None]:
        """See `Engine.generate`."""
        if self._link.trouble is not None:
            raise DecodeUnavailableError(self._link.trouble)
        version = request.version
        async with nullcontext() if version is None else self._residents.pinned(version.artefact) as adapter:
            if self._scheduler.full:
                raise OverloadedError(f"{len(self._scheduler)} prompts are waiting already")
            now = time.monotonic()
            job = Job(PassItem(request, adapter), now, now + self._request_timeout)
            self._live[request.request_id] = job
            self._scheduler.add(Waiting(job, len(job.item.ids)))
            self._arrived.set()
            try:
                # the adapter stays pinned until the first token: after the prompt pass nobody needs it
                async with asyncio.timeout(self._request_timeout):
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
        loop = asyncio.get_running_loop()
        (draws,) = await loop.run_in_executor(self._computing, run_prompt_pass, self._model, [item])
        if draws is None:
            raise AdapterError("with this adapter the logits are not finite")

    # ---- the loop ------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        while True:
            scheduled = await self._schedule()
            if scheduled:
                await self._run(scheduled)

    async def _schedule(self) -> Scheduled:
        await self._wait_for_work()
        batch = self._scheduler.next_batch(time.monotonic())
        opened = await asyncio.gather(*(self._open(waiting.job) for waiting in batch))
        scheduled: Scheduled = []
        put_back: list[Waiting[Job]] = []
        for waiting, room in zip(batch, opened, strict=True):
            job = waiting.job
            if isinstance(room, NoRoomError) or put_back:  # whoever came later waits behind the first refused
                if isinstance(room, HandOff):
                    await room.abort("an earlier prompt goes first")
                    job.attempt += 1
                if job.stage is Stage.QUEUED:
                    hint = room.retry_after if isinstance(room, NoRoomError) else 0.0
                    put_back.append(Waiting(job, waiting.tokens, time.monotonic() + hint))
            elif job.stage is Stage.QUEUED:
                job.stage = Stage.PREFILLING
                scheduled.append((job, room))
            elif room is not None:  # the client left while room was being reserved
                await room.abort("cancelled")
        for waiting in reversed(put_back):
            self._scheduler.put_back(waiting)
        return scheduled

    async def _open(self, job: Job) -> HandOff | NoRoomError | None:
        """The hand-off; None if none is needed or the job has ended; NoRoomError if it has to wait."""
        if job.stage is not Stage.QUEUED or not job.needs_decode:
            return None
        try:
            return await self._link.open(job.request, job.attempt, job.deadline_unix_ms)
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

    async def _run(self, scheduled: Scheduled) -> None:
        if self._hand_overs:  # at most two passes' KV caches are in memory
            await asyncio.wait(self._hand_overs)
        loop = asyncio.get_running_loop()
        items = [job.item for job, _ in scheduled]
        starts = accumulate((len(item.ids) for item in items[:-1]), initial=0)
        rows = [
            PassRows(hand_off, start, 0, len(job.item.ids))
            for (job, hand_off), start in zip(scheduled, starts, strict=True)
            if hand_off is not None
        ]
        layers = PassLayers(self._model.num_layers, loop, rows, self._encoding)
        for job, hand_off in scheduled:
            if hand_off is not None:
                task = asyncio.create_task(hand_over(job, hand_off, layers, self._link))
                self._hand_overs.add(task)
                task.add_done_callback(self._hand_overs.discard)
        try:
            draws = await loop.run_in_executor(
                self._computing, run_prompt_pass, self._model, items, layers.put
            )
        except Exception:
            logger.exception("a prompt pass of %d prompts failed", len(items))
            layers.fail()
            for job, _ in scheduled:
                job.fail(InternalError("the prompt pass failed; the server's log says why"))
            return
        layers.finish(items, draws)
        for (job, hand_off), first in zip(scheduled, draws, strict=True):
            if hand_off is None:
                deliver_first_tokens(job, first)

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

    # ---- tokens and losses -----------------------------------------------------------------------------

    def _on_event(self, event: TokenEvent) -> None:
        job = self._live.get(event.request_id)
        if job is None or job.stage is Stage.FINISHED:
            return
        if event.token is None:
            self._link.cancel(event.request_id, event.attempt)
            job.fail(event_error(event))
        else:
            job.outputs.put_nowait(token_out(event))

    def _on_lost(self, trouble: str) -> None:
        for job in list(self._live.values()):
            if job.stage in (Stage.COMMITTING, Stage.DECODING):
                job.fail(DecodeUnavailableError(f"the decode service was lost in mid-stream: {trouble}"))

    def _release(self, job: Job) -> None:
        """Forgets a job, whatever stage it is in, and frees what it holds on both sides."""
        if self._live.get(job.request.request_id) is job:
            del self._live[job.request.request_id]
        if job.stage is Stage.QUEUED:
            self._scheduler.remove(job)
        elif job.stage is Stage.DECODING:
            self._link.cancel(job.request.request_id, job.attempt)
        job.stage = Stage.FINISHED
