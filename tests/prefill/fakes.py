"""Prompts of plain data, and the engine's parts as tests want them: no model, no connection."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvtransfer.errors import TimedOutError
from prad.artefact import AdapterRecord, Artefact, BaseModelRef
from prad.core.kv import BlockPool
from prad.core.sampling import SamplingParams, ScoredToken, Token, TokenEvent
from prefill_service.decode_link import NoRoom
from prefill_service.engine import PrefillEngine
from prefill_service.errors import ServingError
from prefill_service.prompt import DecodeSize, Prompt, PromptRequest, TaskVersion
from prefill_service.scheduler import PromptScheduler
from prefill_service.settings import PrefillSettings


def adapter(*, virtual_tokens: int = 0, whole: bool = False) -> Any:
    """What prompts and keys know of one."""
    return SimpleNamespace(
        virtual_tokens=virtual_tokens,
        task_embeddings=None,
        state_widths={},
        method=SimpleNamespace(needs_whole_prompt=whole),
    )


def version(digest: str, task: str = "task") -> TaskVersion:
    base = BaseModelRef(name="tiny", architecture="llama", weights="tiny")
    record = AdapterRecord(method="pa", config={}, base=base)
    return TaskVersion(task, 1, digest, Artefact(Path(), record, {}, digest))


def request(name: str, ids: Sequence[int] = (1, 2, 3), *, max_tokens: int = 20, **more: Any) -> PromptRequest:
    more = {"version": None, "sampling": SamplingParams(max_tokens=max_tokens)} | more
    return PromptRequest(name, prompt_ids=tuple(ids), **more)


def prompt(
    name: str,
    tokens: int | Sequence[int],
    *,
    digest: str | None = None,
    whole: bool = False,
    salt: str | None = None,
    task: str | None = None,
) -> Prompt:
    """tokens: how many, shared with no other name; or which. task: whose turn it takes."""
    first = 1000 * (hash(name) % 10**9)
    ids = tuple(range(first, first + tokens)) if isinstance(tokens, int) else tuple(tokens)
    own = None if digest is None and not whole else adapter(whole=whole)
    named = version(digest or "none", task or "task") if digest or task else None
    return Prompt(request(name, ids, version=named, cache_salt=salt), own)


@dataclass(eq=False)
class HandOff:
    """Room at decode. `slow`: what its abort waits for."""

    prompt: Prompt
    slow: asyncio.Event | None = None
    aborted: str | None = None
    committed: list[Token] | None = None
    fails: Exception | None = None
    failure: Exception | None = None

    async def __aenter__(self) -> "HandOff":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abort("left")

    async def commit(self, tokens: list[Token], text_ids: Sequence[int] = (), alike: int = 0) -> None:
        if self.fails is not None:
            raise self.fails
        self.committed = tokens

    async def abort(self, reason: str) -> None:
        if self.committed is None and self.aborted is None:
            self.aborted = reason
            if self.slow is not None:
                await self.slow.wait()


@dataclass
class Link:
    """Decode has room unless `answer` says otherwise; `tell`, `lose` and `found` are what it says later."""

    trouble: str | None = None
    answer: Callable[[Prompt], HandOff | NoRoom | ServingError] = HandOff
    opened: list[Any] = field(default_factory=list)
    cancelled: list[tuple[Any, ...]] = field(default_factory=list)
    asked: list[list[tuple[str, int, int]]] = field(default_factory=list)

    async def run(
        self,
        tell: Callable[[TokenEvent], None],
        lose: Callable[[str], None],
        found: Callable[[DecodeSize], None],
    ) -> None:
        self.tell, self.lose, self.found = tell, lose, found
        await asyncio.Event().wait()

    async def reserve(self, prompts: Sequence[Prompt]) -> dict[Prompt, Any]:
        rooms = {prompt: self.answer(prompt) for prompt in prompts}
        self.opened += rooms.values()
        return rooms

    def cancel(self, request_id: str, attempt: int, choice: int | None = None) -> None:
        self.cancelled.append((request_id, attempt) if choice is None else (request_id, attempt, choice))

    def doubt_after(self, error: Exception) -> None:
        if isinstance(error, TimedOutError):
            self.trouble = "it does not answer"

    def ask(self, sequences: Sequence[tuple[str, int, int]]) -> None:
        self.asked.append(list(sequences))


class Layers:
    """All of them are on their way."""

    async def sent(self) -> None:
        return

    def state(self, prompt: Prompt) -> dict[str, memoryview]:
        return {}


@dataclass
class Passes:
    """Every choice draws `drawn`, and every given token that is to be scored is `scored`; `hold` keeps a pass
    from ending, `fails` breaks it off; `sending` holds up
    what is sent before it, `unsent` says whose is not."""

    ran: list[list[tuple[str, int, int]]] = field(default_factory=list)
    hold: asyncio.Event | None = None
    fails: Exception | None = None
    sending: asyncio.Event | None = None
    drawn: Token = field(default_factory=lambda: Token(40))
    scored: ScoredToken = field(default_factory=lambda: ScoredToken(41, -1.0))
    unsent: dict[str, Exception] = field(default_factory=dict)
    closed: bool = False

    async def send_cached(self, chunks: Any) -> Any:
        if self.sending is not None:
            await self.sending.wait()
        rooms = {c.prompt.request.request_id: c.prompt.hand_off for c in chunks}
        return {rooms[name]: error for name, error in self.unsent.items() if name in rooms}

    async def run(self, chunks: Any) -> Any:
        self.ran.append([(c.prompt.request.request_id, c.start, c.end) for c in chunks])
        if self.hold is not None:
            await self.hold.wait()
        if self.fails is not None:
            raise self.fails
        done = [c.prompt for c in chunks if c.prompt.ends_with(c)]
        drawn = {p: [self.drawn] * (p.request.choices if p.request.sampling.max_tokens else 0) for p in done}
        scores = {c.prompt: [self.scored] * len(c) for c in chunks if c.prompt.request.scoring}
        return SimpleNamespace(first_tokens=drawn, layers=Layers(), scores=scores)

    def close(self) -> None:
        self.closed = True


@dataclass
class Residents:
    """`loaded`: what loading an adapter waits for; `full`: whether others take all room."""

    loaded: asyncio.Event | None = None
    full: bool = False
    pins: int = 0
    taken: int = 0

    def holds(self, artefact: Artefact) -> bool:
        return not self.full

    def has_room(self, artefact: Artefact) -> bool:
        return not self.full

    @asynccontextmanager
    async def pinned(self, artefact: Artefact, *, last: bool = False) -> AsyncIterator[Any]:
        self.pins += 1
        self.taken += 1
        try:
            if self.loaded is not None:
                await self.loaded.wait()
            yield adapter()
        finally:
            self.pins -= 1


class Setting:
    """An engine, and the parts that it was made of."""

    def __init__(
        self, *, max_waiting: int = 9, clock: Callable[[], float] = time.monotonic, **settings: Any
    ) -> None:
        self.link, self.passes, self.residents = Link(), Passes(), Residents()
        self.scheduler = PromptScheduler(
            BlockPool(40, 4, keep=20),
            pass_tokens=50,
            chunk_tokens=10,
            pass_prompts=8,
            max_waiting=max_waiting,
        )
        parts: list[Any] = [self.scheduler, self.passes, self.link, self.residents]
        self.engine = PrefillEngine(*parts, PrefillSettings(gather_s=0, **settings), clock)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.engine.run())
        await asyncio.sleep(0)
        try:
            yield
            await self.idle()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert self.passes.closed
        assert (self.engine.live, self.engine.waiting, self.residents.pins) == (0, 0, 0)
        assert self.scheduler.blocks.in_use == 0

    async def idle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def tell(
        self, index: int, reason: str | None = None, tokens: int = 1, name: str = "r", choice: int = 0
    ) -> None:
        drawn = tuple(Token(40 + index + i) for i in range(tokens))
        self.link.tell(TokenEvent(name, 1, choice, index, drawn, reason))

    async def until(self, true: Callable[[], object]) -> None:
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def only_token(self, of: PromptRequest) -> TokenEvent:
        (token,) = [token async for token in self.engine.generate(of)]
        return token
