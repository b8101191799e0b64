"""The engine behind the HTTP face: a request's way from its adapter, brought into memory if it is not there,
to its last token.

Its prompt goes through `PassLoop` to the first token; later ones come from decode.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prad.artefact import Artefact
from prad.core.sampling import TokenEvent
from prefill_service.beams import searched
from prefill_service.decode_link import DecodeLink, event_error
from prefill_service.errors import (
    DeadlineError,
    DecodeUnavailableError,
    InternalError,
    OverloadedError,
    ServingError,
)
from prefill_service.pass_loop import PassLoop
from prefill_service.prompt import Committing, Decoding, Finished, Flow, Prompt, PromptRequest
from prefill_service.replays import Attempt, behind, decode_is_back, survives, unsaid
from prefill_service.scheduler import PromptScheduler
from prefill_service.settings import PrefillSettings

if TYPE_CHECKING:
    from prad.adapters import Adapter
    from prefill_service.passes import PassRunner

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 2.0


class PrefillEngine:
    """Implements `prefill_service.prompt.Engine`; `run()` is a task beside the HTTP server. `clock`: in which
    `settings` count."""

    def __init__(
        self,
        scheduler: PromptScheduler,
        passes: "PassRunner",
        link: DecodeLink,
        residents: "Residents",
        settings: PrefillSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._link = link
        self._residents = residents
        self._settings = settings
        self._clock = clock
        self._loop = PassLoop(scheduler, passes, link, settings, clock)
        self._loading = Counter[Flow]()

    @property
    def trouble(self) -> str | None:
        """See `Engine.trouble`."""
        return self._link.trouble

    @property
    def waiting(self) -> int:
        """Prompts of which nothing is computed: in the queue, or waiting for their adapter."""
        return len(self._scheduler) + self._loading.total()

    @property
    def live(self) -> int:
        """Prompts anywhere between arrival and last token."""
        return len(self._loop.live) + self._loading.total()

    async def run(self) -> None:
        """Serves until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._link.run(self._on_event, self._on_lost, self._scheduler.decode_has))
            tasks.create_task(self._loop.run())
            tasks.create_task(self._ask_now_and_then())

    def generate(self, request: PromptRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        deadline = self._clock() + self._settings.request_timeout_s
        if request.beams is None:
            return self._tokens(request, deadline, Attempt(again=not request.gives_way))
        back = partial(self._decode_is_back, deadline)
        return searched(lambda attempt: self._tokens(request, deadline, Attempt(attempt)), back)

    def cancel_choice(self, request_id: str, choice: int) -> None:
        """See `Engine.cancel_choice`."""
        prompt = self._loop.live.get(request_id)
        if prompt is not None:
            prompt.running.discard(choice)
            prompt.awaited.discard(choice)
            if isinstance(prompt.state, Decoding):
                self._link.cancel(request_id, prompt.attempt, choice)
                if not prompt.awaited:
                    self._loop.left_decode(prompt)

    # ---- a request, from its adapter to its last token ---------------------------------------------------

    async def _tokens(
        self, request: PromptRequest, deadline: float, attempt: Attempt
    ) -> AsyncGenerator[TokenEvent, None]:
        if self._link.trouble is not None:
            raise DecodeUnavailableError(self._link.trouble)
        prompt = None
        back = partial(self._decode_is_back, deadline)
        said = [list[int]() for _ in range(request.choices)]  # ids that the client has
        try:
            # pinned until the first token: after the prompt pass nobody needs it
            async with self._adapter_of(request, deadline, under_way=attempt.number > 1) as adapter:
                prompt = Prompt(request, adapter, self._clock(), deadline, attempt=attempt.number)
                if attempt.running is not None:
                    prompt.running.intersection_update(attempt.running)
                left = deadline - self._clock()  # one timer: none of its tokens sets up its own
                overdue = asyncio.get_running_loop().call_later(left, self._expire, prompt)
                self._loop.add(prompt)
                output = await prompt.outputs.get()
            while True:
                if isinstance(output, ServingError):
                    if not (attempt.again and await survives(output, request, said, back)):
                        raise output
                    if not prompt.running:  # whoever waited for it has left meanwhile
                        return
                    break
                said[output.choice] += [token.id for token in output.tokens]
                if output.finish_reason is not None:
                    prompt.running.discard(output.choice)
                    if not prompt.running:
                        self._loop.finish(prompt)
                yield output
                if not prompt.running:
                    return
                output = await prompt.outputs.get()
        finally:
            if prompt is not None:
                overdue.cancel()
                self._loop.release(prompt)
        rest, told = behind(request, said)
        again = self._tokens(rest, deadline, Attempt(prompt.attempt + 1, running := {*prompt.running}))
        async with aclosing(unsaid(again, told, running, output)) as events:
            async for event in events:
                yield event

    @asynccontextmanager
    async def _adapter_of(
        self, request: PromptRequest, deadline: float, *, under_way: bool
    ) -> "AsyncIterator[Adapter | None]":
        """The request's adapter, pinned. Waiting for room for it, and loading it, count against the queue's
        bound and the deadline."""
        if not (begun := under_way or request.output_offset > 0):  # what is under way goes on
            self._turn_away(request, deadline)
        async with AsyncExitStack() as held:
            adapter: Adapter | None = None
            self._loading[request.flow] += 1
            try:
                async with asyncio.timeout(deadline - self._clock()):
                    if request.version is not None:
                        pinned = self._residents.pinned(request.version.artefact, last=request.behind)
                        adapter = await held.enter_async_context(pinned)
            except TimeoutError:
                raise self._too_late(begun=begun) from None
            finally:
                self._loading[request.flow] -= 1
                self._loading += Counter()  # forgets those with none
            yield adapter

    def _turn_away(self, request: PromptRequest, deadline: float) -> None:
        """Raises OverloadedError if the queue has no place for it, or is not expected to reach it in time.
        Another one ends only for who does come in."""
        if request.gives_way:
            self._require_leisure(request)
        elif not request.behind:
            room = request.version is None or self._residents.has_room(request.version.artefact)
            self._loop.clear_the_way(crowded=not room or self._scheduler.full(self._loading.total()))
        yields = None
        if self._scheduler.full(self._loading.total()):
            many, after_s = self.waiting, self._scheduler.expected_place()
            if request.behind or (yields := self._scheduler.yields(request.flow, self._loading)) is None:
                raise OverloadedError(
                    f"{many} prompts are waiting already; try again later", retry_after=after_s
                )
        may = min(deadline - self._clock(), self._settings.queue_timeout_s)
        wait = self._scheduler.expected_wait(request)
        if wait is not None and wait > may:
            raise OverloadedError(
                f"this request would wait for some {wait:.0f} s behind those of its task and key and its "
                f"turns among others, and may wait for {may:.0f} s; try again later",
                retry_after=max(1.0, wait - may),
            )
        if yields is not None:
            why = f"{many} prompts are waiting, most of them of this task and key: another's goes first"
            self._loop.fail(yields, OverloadedError(f"{why}; try again later", retry_after=after_s))

    def _require_leisure(self, request: PromptRequest) -> None:
        """Raises OverloadedError if anybody waits, or somebody's adapter would have to leave for this."""
        if self.waiting or (request.version and not self._residents.holds(request.version.artefact)):
            raise OverloadedError("others wait, or their adapters take all room")

    def _expire(self, prompt: Prompt) -> None:
        begun = prompt.goes_on or isinstance(prompt.state, Committing | Decoding)
        if prompt.request.behind and not begun:  # it waited for others' sake
            self._loop.fail(prompt, OverloadedError("its turn did not come", retry_after=1.0))
        else:
            self._loop.fail(prompt, self._too_late(begun=begun))

    def _too_late(self, *, begun: bool) -> DeadlineError:
        none = f"no token within {self._settings.request_timeout_s:g} s"
        return DeadlineError("the request took longer than it may" if begun else none)

    # ---- tokens and losses -----------------------------------------------------------------------------

    def _on_event(self, event: TokenEvent) -> None:
        prompt = self._loop.live.get(event.request_id)
        if prompt is None or isinstance(prompt.state, Finished) or event.choice not in prompt.awaited:
            return
        if event.attempt != prompt.attempt:  # the end of one that was given up
            return
        if event.finish_reason is not None:
            prompt.awaited.discard(event.choice)
        drawn = len(event.tokens)
        if prompt.request.beams is not None:  # and as much for hypotheses that are not told
            drawn = drawn * prompt.request.sequences // prompt.request.choices
        self._scheduler.drew(prompt, drawn)
        for output in event.each():
            prompt.outputs.put_nowait(output)
        if event.is_early_end or not event.tokens:
            self._loop.fail(prompt, event_error(event))
        elif not prompt.awaited:
            self._loop.left_decode(prompt)

    async def _ask_now_and_then(self) -> None:
        """So that no answer waits for tokens of a sequence that decode has lost without a word."""
        while True:
            await asyncio.sleep(_ASK_EVERY_S)
            awaited = [
                (prompt.request.request_id, prompt.attempt, choice)
                for prompt in self._loop.live.values()
                if isinstance(prompt.state, Decoding)
                for choice in sorted(prompt.awaited)
            ]
            if awaited:
                self._link.ask(awaited)

    async def _decode_is_back(self, deadline: float) -> bool:
        """Whether there is a decode service again, as soon as there is, or as a prompt may wait for room."""
        until = min(deadline, self._clock() + self._settings.queue_timeout_s)
        return await decode_is_back(self._link, until, self._clock)

    def _on_lost(self, trouble: str) -> None:
        for prompt in list(self._loop.live.values()):
            if isinstance(prompt.state, Committing | Decoding):
                lost = f"the decode service was lost in mid-stream: {trouble}"
                self._loop.fail(prompt, DecodeUnavailableError(lost))


@dataclass(slots=True)
class _Resident:
    """loaded: done once the adapter is in memory; nbytes: what it takes, its file's share until then."""

    loaded: "asyncio.Future[Adapter]"
    nbytes: int
    pins: int = 0


@dataclass(eq=False, slots=True)
class _Waiting:
    """turn: has the resident, pinned, once there is one; last: behind all others."""

    artefact: Artefact
    turn: "asyncio.Future[_Resident]"
    last: bool


class Residents:
    """Adapters in memory: pinned while a prompt needs them, least recently used ones leave first.

    Bounded by `capacity` bytes; one that is larger is alone. Keyed by digest: versions with the same files
    share one adapter. Who finds no room waits in line, the oldest first. Nobody overtakes, or adapters in
    steady use would keep it from its room for ever; but those in line who want the same adapter go with it.
    `itemsize`: bytes of a matrix's number in memory. Adapters whose digests are in `stay` leave after all
    others.
    """

    def __init__(
        self,
        load: "Callable[[Artefact], Adapter]",
        capacity: int,
        itemsize: int,
        stay: Container[str] = (),
    ) -> None:
        self._load = load
        self._stay = stay
        self._capacity = capacity
        self._itemsize = itemsize
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._line: list[_Waiting] = []

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self._residents.values())

    def __len__(self) -> int:
        return len(self._residents)

    @asynccontextmanager
    async def pinned(self, artefact: Artefact, *, last: bool = False) -> "AsyncIterator[Adapter]":
        """The artefact's adapter, kept in memory inside the `async with`; waits until there is room for it,
        behind those in line, or the `last` of all. Who holds one must not wait for another. Raises
        InternalError if the files do not load."""
        resident = await self._in_turn(artefact, last)
        try:
            yield await asyncio.shield(resident.loaded)
        finally:
            self._unpin(resident)

    async def _in_turn(self, artefact: Artefact, last: bool) -> _Resident:
        waiting = _Waiting(artefact, asyncio.get_running_loop().create_future(), last)
        self._line.append(waiting)
        self._line.sort(key=lambda each: each.last)
        self._call_up()
        try:
            return await asyncio.shield(waiting.turn)
        except asyncio.CancelledError:  # it leaves; its turn may have come in the same moment
            if waiting.turn.done():
                self._unpin(waiting.turn.result())
            else:
                self._line.remove(waiting)
                self._call_up()
            raise

    def _call_up(self) -> None:
        """Pins for the first in line as long as there is room, and for all who wait for the same."""
        while self._line and self.has_room(artefact := self._line[0].artefact):
            resident = self._residents.get(artefact.digest) or self._start_loading(artefact)
            self._residents.move_to_end(artefact.digest)
            line, self._line = self._line, []
            for waiting in line:
                if waiting.artefact.digest != artefact.digest:
                    self._line.append(waiting)
                else:
                    resident.pins += 1
                    waiting.turn.set_result(resident)

    def _unpin(self, resident: _Resident) -> None:
        resident.pins -= 1
        self._call_up()

    def has_room(self, artefact: Artefact) -> bool:
        """Whether it is in memory, or fits beside what is in use."""
        if artefact.digest in self._residents:
            return True
        in_use = sum(resident.nbytes for resident in self._residents.values() if _in_use(resident))
        return not in_use or in_use + artefact.nbytes(self._itemsize) <= self._capacity

    def holds(self, artefact: Artefact) -> bool:
        """Whether it is in memory, or fits there beside all others."""
        there = artefact.digest in self._residents
        return there or (not self._line and self.nbytes + artefact.nbytes(self._itemsize) <= self._capacity)

    def _start_loading(self, artefact: Artefact) -> _Resident:
        nbytes = artefact.nbytes(self._itemsize)
        self._make_room(nbytes)
        loading = asyncio.create_task(self._load_one(artefact))
        resident = self._residents[artefact.digest] = _Resident(loading, nbytes)
        return resident

    async def _load_one(self, artefact: Artefact) -> "Adapter":
        try:
            adapter = await asyncio.to_thread(self._load, artefact)
        except Exception as error:
            logger.exception("the adapter %s does not load", artefact.digest)
            del self._residents[artefact.digest]
            self._call_up()
            raise InternalError(f"the adapter {artefact.digest[:12]} does not load: {error}") from error
        self._residents[artefact.digest].nbytes = adapter.nbytes  # a method may derive more
        self._make_room(0)
        asyncio.get_running_loop().call_soon(self._call_up)  # when this is done: who wanted it may have left
        return adapter

    def _make_room(self, nbytes: int) -> None:
        """As far as what is in use leaves any."""
        leaving = sorted(self._residents.items(), key=lambda held: held[0] in self._stay)
        for digest, resident in leaving:
            if self.nbytes + nbytes <= self._capacity:
                return
            if not _in_use(resident):
                del self._residents[digest]


def _in_use(resident: _Resident) -> bool:
    return resident.pins > 0 or not resident.loaded.done()
