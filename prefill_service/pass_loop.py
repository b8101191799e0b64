"""The loop that all prompts go through: schedule -> run -> deliver.

schedule   choose the chunks of the next pass, reserve room at decode for prompts that begin (Open), send what
           they have from earlier ones
run        one packed prompt pass in the computing thread; its layers go out while it runs, or behind it
deliver    first tokens to the client and, with Commit, to decode
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvtransfer.errors import TransferError
from kvtransfer.sender import HandOff
from prad.core.kv import Chunk
from prad.core.sampling import Token, TokenEvent
from prefill_service.beams import deliver_candidates
from prefill_service.decode_link import DecodeLink, NoRoom, Opened, alike, text_ids
from prefill_service.errors import (
    DecodeUnavailableError,
    GrammarBrokeError,
    InternalError,
    OverloadedError,
    ServingError,
)
from prefill_service.prompt import Committing, Decoding, Finished, Prefilling, Prompt, Queued
from prefill_service.scheduler import PromptScheduler
from prefill_service.scored import broken, deliver_scores
from prefill_service.settings import PrefillSettings

if TYPE_CHECKING:
    from prefill_service.passes import PassLayers, PassResult, PassRunner

logger = logging.getLogger(__name__)

_BLOCKS_PINNED_S = 0.002
_GATHER_MOST_S = 0.1


class PassLoop:
    """Moves prompts from state to state, but for the queue, which is the scheduler's.

    `live`: those between arrival and last token, by request id. `clock` is the one in which `settings` count.
    """

    def __init__(
        self,
        scheduler: PromptScheduler,
        passes: "PassRunner",
        link: DecodeLink,
        settings: PrefillSettings,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._passes = passes
        self._link = link
        self._settings = settings
        self._clock = clock
        self.live: dict[str, Prompt] = {}
        self._changed = asyncio.Event()
        self._arrivals = 0
        self._beside: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._wait_for_work()
                await self._gather()
                chunks = await self._prepare(await self._schedule())
                if chunks and (result := await self._run(chunks)) is not None:
                    self._deliver(chunks, result)
                if chunks and self._settings.yield_s and self._any_decodes():
                    await asyncio.sleep(self._settings.yield_s)
        finally:
            self._passes.close()

    def add(self, prompt: Prompt) -> None:
        self.live[prompt.request.request_id] = prompt
        self._scheduler.add(prompt)
        self._arrivals += 1
        self._changed.set()

    def finish(self, prompt: Prompt) -> None:
        """Every choice of it has ended, and decode has freed it already: there is nothing to cancel."""
        prompt.state = Finished()

    def left_decode(self, prompt: Prompt) -> None:
        """Decode has freed it, whatever its client has yet to read: others may have waited for that."""
        self._scheduler.left_decode(prompt)
        self._changed.set()

    def release(self, prompt: Prompt) -> None:
        """Nobody waits for its tokens any more."""
        if self.live.get(prompt.request.request_id) is prompt:
            del self.live[prompt.request.request_id]
        self._end(prompt)

    def fail(self, prompt: Prompt, error: ServingError) -> None:
        """Ends it with an error, unless it has ended."""
        if not isinstance(prompt.state, Finished):
            self._end(prompt)
            prompt.outputs.put_nowait(error)

    def _end(self, prompt: Prompt) -> None:
        """Frees what it holds on both sides, whatever state it is in. One that is being committed is
        cancelled when that is done."""
        self._scheduler.remove(prompt)
        self._changed.set()  # others may have waited for what it held
        if isinstance(prompt.state, Decoding):
            self._link.cancel(prompt.request.request_id, prompt.attempt)
        self._give_back(prompt.hand_off, "cancelled")
        prompt.state, prompt.hand_off = Finished(), None

    def _give_back(self, room: Opened | None, reason: str) -> None:
        """Decode may take its time to say so: nobody waits for that."""
        if room is not None and not isinstance(room, NoRoom | ServingError):
            self._do_beside(room.abort(reason))

    # ---- a turn --------------------------------------------------------------------------------------

    async def _schedule(self) -> list[Chunk[Prompt]]:
        """The chunks of the next pass: those of prompts that have room at decode, or need none."""
        chunks = self._scheduler.next_pass(self._clock())
        if not chunks:  # the oldest prompt waits for blocks that are still being sent
            await asyncio.sleep(_BLOCKS_PINNED_S)
        if any(not chunk.prompt.request.gives_way for chunk in chunks):
            self._end_those_that_give_way(chunk.prompt for chunk in chunks)
        asking = [chunk.prompt for chunk in chunks if _asks_for_room(chunk.prompt)]
        rooms = await self._link.reserve(asking)
        admitted = self._admit(chunks, rooms)
        if self._scheduler.held_back or any(isinstance(room, NoRoom) for room in rooms.values()):
            self._end_those_that_give_way(list(self.live.values()))
            self._turn_away(self._clock() - self._settings.queue_timeout_s)
        return admitted

    def clear_the_way(self, *, crowded: bool) -> None:
        """Somebody comes: what gives way and has no token yet leaves its blocks, its adapter and its turn;
        where there is no place left, so does what waits behind all others. That is asked for again."""
        waiting = [p for p in self.live.values() if isinstance(p.state, Queued | Prefilling)]
        self._end_those_that_give_way([prompt for prompt in waiting if prompt.request.gives_way])
        for prompt in waiting if crowded else ():
            if prompt.request.behind and isinstance(prompt.state, Queued):
                self.fail(prompt, OverloadedError("others need its place", retry_after=1.0))

    def _end_those_that_give_way(self, prompts: Iterable[Prompt]) -> None:
        """Others are about to run, or wait for room."""
        for prompt in prompts:
            if prompt.request.gives_way:
                self.fail(prompt, OverloadedError("others wait"))

    def _turn_away(self, before: float) -> None:
        """Ends who waits for room at decode since then, asked for in this turn or not."""
        for prompt in self._scheduler.want_room_since(before):
            if prompt.request.behind:
                continue  # it waits for as long as the others need
            self.fail(
                prompt,
                OverloadedError(
                    f"no room for this request within {self._settings.queue_timeout_s:g} s: the decode "
                    "service is full; try again later, or with a lower n or max_tokens",
                    retry_after=max(1.0, self._scheduler.expected_wait(prompt.request) or 0.0),
                ),
            )

    def _admit(self, chunks: Sequence[Chunk[Prompt]], rooms: Mapping[Prompt, Opened]) -> list[Chunk[Prompt]]:
        """Those that may run; the others go back. Who wants less than one without room may pass it."""
        admitted, without, now = list[Chunk[Prompt]](), list[Prompt](), self._clock()
        for chunk in chunks:
            prompt, room = chunk.prompt, rooms.get(chunk.prompt)
            waits = _asks_for_room(prompt) and any(prompt.wanted.at_least(p.wanted) for p in without)
            if isinstance(room, ServingError):
                self.fail(prompt, room)
                room = None
            if not isinstance(prompt.state, Prefilling):  # failed, or the client left meanwhile
                self._give_back(room, "cancelled")
                self._scheduler.put_back(chunk)
            elif isinstance(room, NoRoom):
                without.append(prompt)
                self._scheduler.put_back(chunk, now + room.retry_after)
            elif waits or (room is None and _asks_for_room(prompt)):
                if room is not None:
                    self._give_back(room, "an earlier prompt goes first")
                    prompt.attempt += 1
                self._scheduler.put_back(chunk)
            else:
                prompt.hand_off = room or prompt.hand_off
                admitted.append(chunk)
        return admitted

    async def _prepare(self, chunks: Sequence[Chunk[Prompt]]) -> list[Chunk[Prompt]]:
        """Those that are still worth computing once what they begin with is on its way: whose room at decode
        is not lost, and whom the client, or the deadline, has not left meanwhile."""
        try:
            broken = await self._passes.send_cached(chunks)
        except Exception:
            self._pass_failed(chunks)
            return []
        for chunk in chunks:
            hand_off = chunk.prompt.hand_off
            error = None if hand_off is None else broken.get(hand_off) or hand_off.failure
            if error is not None:
                self._hand_off_failed(chunk.prompt, error)
            if not isinstance(chunk.prompt.state, Prefilling):
                self._scheduler.put_back(chunk)
        return [chunk for chunk in chunks if isinstance(chunk.prompt.state, Prefilling)]

    def _hand_off_failed(self, prompt: Prompt, error: Exception) -> None:
        self._link.doubt_after(error)
        if isinstance(error, TransferError):
            broke = f"the hand-off to the decode service broke off: {error}"
            self.fail(prompt, DecodeUnavailableError(broke))
        else:
            logger.error("the hand-off of %s failed", prompt.request.request_id, exc_info=error)
            self.fail(prompt, InternalError("the hand-off failed; the server's log says why"))

    async def _run(self, chunks: Sequence[Chunk[Prompt]]) -> "PassResult | None":
        """None if the pass failed, and all its prompts with it."""
        try:
            result = await self._passes.run(chunks)
        except Exception:
            self._pass_failed(chunks)
            return None
        for prompt, scores in result.scores.items():
            prompt.scores += scores
        without = {p for p, tokens in result.first_tokens.items() if tokens is None}
        self._scheduler.computed({prompt for prompt in without if prompt.trouble is None})
        return result

    def _pass_failed(self, chunks: Sequence[Chunk[Prompt]]) -> None:
        logger.exception("a prompt pass of %d prompts failed", len(chunks))
        self._scheduler.failed()
        for chunk in chunks:
            self.fail(chunk.prompt, InternalError("the prompt pass failed; the server's log says why"))

    def _deliver(self, chunks: Sequence[Chunk[Prompt]], result: "PassResult") -> None:
        """First tokens to the HTTP side; what goes on is committed, beside the next passes."""
        for prompt in (chunk.prompt for chunk in chunks if chunk.prompt.ends_with(chunk)):
            state, tokens = prompt.state, result.first_tokens[prompt]
            if not isinstance(state, Prefilling):  # the client left meanwhile
                continue
            if prompt.scores and broken(prompt.scores):
                tokens = None
            if tokens is not None and (prompt.request.scoring is not None or not tokens):
                deliver_scores(prompt, state.cached)
            if tokens is None:
                self.fail(prompt, _why_none(prompt))
            elif _deliver_first(prompt, tokens, state.cached) and prompt.hand_off is not None:
                hand_off, prompt.hand_off = prompt.hand_off, None
                prompt.state = Committing()
                self._do_beside(self._commit(prompt, hand_off, result.layers, tokens))
            else:
                self._end(prompt)

    async def _commit(
        self, prompt: Prompt, hand_off: HandOff, layers: "PassLayers", tokens: Sequence[Token]
    ) -> None:
        """Hands a prompt over once its last layer is on its way. What the client cancelled before decode had
        confirmed is cancelled there afterwards."""
        request_id, attempt = prompt.request.request_id, prompt.attempt
        try:
            async with hand_off:
                await layers.sent()
                for site, data in layers.state(prompt).items():
                    await hand_off.send_state(site, data)
                await hand_off.commit(tokens, text_ids(prompt), alike(prompt))
        except Exception as error:
            self._hand_off_failed(prompt, error)
        if not isinstance(prompt.state, Committing):  # over meanwhile; decode may have it all the same
            self._link.cancel(request_id, attempt)
            return
        prompt.state = Decoding()
        for choice in set(range(prompt.request.choices)) - prompt.running:
            self._link.cancel(request_id, attempt, choice)

    # ---- waiting -------------------------------------------------------------------------------------

    async def _wait_for_work(self) -> None:
        """Returns when the head of the queue may run."""
        while True:
            due = self._scheduler.next_wakeup()
            if due is not None and due <= self._clock():
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(None if due is None else due - self._clock()):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def _gather(self) -> None:
        """Returns when no prompt came for a moment, or there are enough for a pass.

        A moment in which the event loop was busy does not count: more prompts may lie in it unread.
        """
        now, moment = self._clock(), self._settings.gather_s
        longest = now + _GATHER_MOST_S
        while moment and now < longest and not self._scheduler.fills_a_pass(now):
            known = self._arrivals
            await asyncio.sleep(moment)
            late = self._clock() - now - moment
            if known == self._arrivals and late < moment:
                return
            now = self._clock()

    def _any_decodes(self) -> bool:
        return any(isinstance(prompt.state, Decoding) for prompt in self.live.values())

    def _do_beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Nobody waits for it."""
        task = asyncio.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)


def _why_none(prompt: Prompt) -> ServingError:
    """Why a pass drew nothing for it."""
    if prompt.trouble is not None:
        return GrammarBrokeError(f"the first token was not drawn: {prompt.trouble}", quotes=True)
    return InternalError("the adapter or the model gave numbers that are not finite")


def _asks_for_room(prompt: Prompt) -> bool:
    ended = isinstance(prompt.state, Finished)
    return prompt.needs_decode and prompt.hand_off is None and not ended


def _deliver_first(prompt: Prompt, tokens: list[Token], cached: int) -> bool:
    """Whether it goes on behind what a pass drew for it."""
    if prompt.request.beams is not None:
        return deliver_candidates(prompt, tokens[0], cached)
    return deliver_first(prompt, tokens, cached)


def deliver_first(prompt: Prompt, tokens: list[Token], cached: int) -> bool:
    """Hands the first tokens, one per choice, to the HTTP side; says whether any choice goes on. cached:
    how many of its tokens, virtual ones included, came from the prefix cache."""
    request, index, own = prompt.request, prompt.request.output_offset, prompt.cached_ids(cached)
    reasons = [request.sampling.finish_reason(token.id, index + 1) for token in tokens]
    for choice, (token, reason) in enumerate(zip(tokens, reasons, strict=True)):
        name, told = (request.request_id, prompt.attempt, choice, index), own if choice == 0 else 0
        prompt.outputs.put_nowait(TokenEvent(*name, (token,), reason, cached_tokens=told))
    prompt.awaited = prompt.running & {choice for choice, reason in enumerate(reasons) if reason is None}
    return None in reasons
