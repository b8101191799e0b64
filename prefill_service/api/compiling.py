"""Grammars of requests on their way to the threads that compile: by turns of API keys, within bounds."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeVar

from prad.lm import Grammar, GrammarError, Grammars
from prefill_service.api.rules import Constraint
from prefill_service.errors import InvalidRequestError, OverloadedError

T = TypeVar("T")

MOST_COMPILING = 64
"""Grammars that are compiled or wait for it, under one API key, or of those without."""
COMPILING_S = 60.0
"""That a request waits for its own: the first one also for the vocabulary."""


class CompileQueue:
    """Where grammars of requests wait to be compiled. Those under one API key are compiled one after another:
    whatever they take, others' come between. What is compiled already waits for none."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._turns: dict[str | None, asyncio.Semaphore] = {}
        self._waiting = Counter[str | None]()

    async def compiled(self, constraint: Constraint, *, spaced: bool, key: str | None) -> "Future[Grammar]":
        """In a thread: others go on. Cancelled before its turn, it takes none. Raises InvalidRequestError,
        OverloadedError."""
        kind, source, beside = constraint.kind, constraint.source, constraint.calls
        if (known := self._grammars.remembered(kind, source, spaced=spaced, beside=beside)) is not None:
            return known
        if (many := self._waiting[key]) >= MOST_COMPILING:
            raise OverloadedError(f"{many} grammars are being compiled already; try again later")
        begin = partial(self._grammars.begin_written, kind, source, spaced=spaced, beside=beside)
        try:
            async with asyncio.timeout(COMPILING_S):
                try:
                    return await self._in_turn(key, begin)
                except GrammarError as error:
                    raise await self._blamed(constraint, key, error) from error
        except TimeoutError as error:
            raise OverloadedError(
                f"the grammar of '{constraint.field}' was not compiled within {COMPILING_S:g} s; "
                "try again later"
            ) from error

    async def _blamed(
        self, constraint: Constraint, key: str | None, error: GrammarError
    ) -> InvalidRequestError:
        schemas = list(constraint.schemas)
        if constraint.kind == "json":
            schemas.append((constraint.path, constraint.source))
        blamed = await self._in_turn(key, partial(self._grammars.begin_blaming, schemas))
        path = blamed.result() or constraint.path
        return InvalidRequestError(
            f"'{path}' cannot be kept to: {error}", param=path, code="invalid_grammar", quotes=True
        )

    async def _in_turn(self, key: str | None, begin: "Callable[[], Future[T]]") -> "Future[T]":
        """What `begin` begins, once it is done. Whoever leaves meanwhile keeps the turn until its thread is
        free again. Who shows no key waits for none."""
        turn = self._turns.setdefault(key, asyncio.Semaphore(MOST_COMPILING if key is None else 1))
        self._waiting[key] += 1
        try:
            await turn.acquire()
        except BaseException:
            self._leave(key)
            raise
        try:
            begun = begin()
        except BaseException:
            self._end_turn(key)
            raise
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._end_turn, key)

        begun.add_done_callback(done)
        await asyncio.wrap_future(begun)
        return begun

    def _end_turn(self, key: str | None) -> None:
        self._turns[key].release()
        self._leave(key)

    def _leave(self, key: str | None) -> None:
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key], self._turns[key]
