"""Slow work that many may ask for at once: it is done once, for all who ask while it goes on."""

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


class Shared:
    """On the event loop; the work itself blocks, and runs in `workers`. Whoever asks again and again for what
    takes long keeps one of them busy, not all."""

    def __init__(self, workers: Executor) -> None:
        self._workers = workers
        self._going: dict[Hashable, asyncio.Future[Any]] = {}

    async def do(self, what: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns, or raises: this one's, or that of who asked for the same before."""
        going = self._going.get(what)
        if going is None:
            going = asyncio.get_running_loop().run_in_executor(self._workers, work)
            self._going[what] = going
            going.add_done_callback(lambda _: self._going.pop(what))
        found: T = await asyncio.shield(going)  # others may wait for it still
        return found
