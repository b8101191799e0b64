"""Adapters on their way here: a few at a time, and first those that somebody waits for.

wanted later    the background: what the registry named when this service began to follow it
wanted soon     what is new since then
waited for      what a request names: before all others, in places that those leave free
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import IntEnum

from adapter_registry.errors import RegistryError, RegistryUnreachableError, StoreUnavailableError
from adapter_registry.messages import VersionRoute
from prad.artefact import Artefact
from prefill_service.catalogue import AGAIN_S
from prefill_service.errors import NotReadyError, OverloadedError

logger = logging.getLogger(__name__)

Get = Callable[[str, int, str], Awaitable[Artefact]]


class Turn(IntEnum):
    """Which come first."""

    WAITED_FOR = 0
    SOON = 1
    LATER = 2


AT_ONCE = {Turn.WAITED_FOR: 8, Turn.SOON: 6, Turn.LATER: 4}
"""How many may be fetched at once when one begins: places are left free for those before it."""


class Fetch:
    """One version that is not here yet. Implements `catalogue.Coming`."""

    def __init__(self, task: str, version: VersionRoute, fetches: "Fetches") -> None:
        self.task = task
        self.version = version
        self.turn = Turn.LATER
        self.tried: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why the latest try failed; empty: it is here."""
        self._fetches = fetches

    @property
    def number(self) -> int:
        return self.version.version

    @property
    def digest(self) -> str:
        return self.version.digest

    @property
    def method(self) -> str:
        return self.version.method

    async def here(self) -> None:
        """See `catalogue.Coming`."""
        await self._fetches.wait_for(self)


class Fetches:
    """`get`: fetches one; `arrived` is told of each that is here, with the artefact, or cannot be had, and
    why. `most_waiting`: requests that may wait; `patience_s`: for how long each."""

    def __init__(
        self,
        get: Get,
        arrived: Callable[[Fetch, Artefact | None, str], None],
        *,
        most_waiting: int,
        patience_s: float,
    ) -> None:
        self._get = get
        self._arrived = arrived
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._fetches: dict[str, dict[int, Fetch]] = {}
        self._queues: dict[Turn, OrderedDict[Fetch, None]] = {turn: OrderedDict() for turn in Turn}
        self._running: dict[Fetch, asyncio.Task[None]] = {}
        self._away = False
        self._told = False  # that nothing can be fetched, since the last time that something was
        self._waiting = 0

    def __len__(self) -> int:
        return sum(map(len, self._fetches.values()))

    def of(self, task: str) -> Mapping[int, Fetch]:
        return dict(self._fetches.get(task, {}))

    def want(self, task: str, versions: Sequence[VersionRoute], turn: Turn) -> Sequence[Fetch]:
        """These versions of the task, and no others of it, in the queue at least as early as `turn` says."""
        known, wanted = self._fetches.pop(task, {}), dict[int, Fetch]()
        for version in versions:
            fetch = known.get(version.version)
            if fetch is None or fetch.digest != version.digest:
                fetch = Fetch(task, version, self)
                self._put(fetch, turn)
            self._hurry(fetch, turn)
            wanted[fetch.number] = fetch
        if wanted:
            self._fetches[task] = wanted
        for fetch in known.values():
            if wanted.get(fetch.number) is not fetch:  # it does not answer any more: who waits looks again
                self._queues[fetch.turn].pop(fetch, None)
                fetch.tried.set_result("")
        self._start()
        return list(wanted.values())

    def go_on(self) -> None:
        """The registry answers."""
        self._away = False
        self._start()

    async def wait_for(self, fetch: Fetch) -> None:
        """Raises NotReadyError if it cannot be had, or does not come in time; OverloadedError if too many
        wait already."""
        if self._waiting >= self._most_waiting:
            raise OverloadedError(f"{self._waiting} requests wait for adapters already; try again later")
        self._hurry(fetch, Turn.WAITED_FOR)
        self._start()
        self._waiting += 1
        try:
            async with asyncio.timeout(self._patience_s):
                why = await asyncio.shield(fetch.tried)
        except TimeoutError:
            why = f"it is on its way, and did not come within {self._patience_s:g} s"
        finally:
            self._waiting -= 1
        if why:
            raise NotReadyError(f"{fetch.task}@{fetch.number} is not here: {why}", retry_after=AGAIN_S)

    async def settled(self, fetches: Iterable[Fetch], seconds: float) -> None:
        """Returns when each of them was tried, or after so long."""
        if tried := [fetch.tried for fetch in fetches]:
            await asyncio.wait(tried, timeout=seconds)

    def close(self) -> None:
        for running in self._running.values():
            running.cancel()

    def _put(self, fetch: Fetch, turn: Turn) -> None:
        fetch.turn = turn
        self._queues[turn][fetch] = None

    def _hurry(self, fetch: Fetch, turn: Turn) -> None:
        if turn < fetch.turn and fetch in self._queues[fetch.turn]:
            del self._queues[fetch.turn][fetch]
            self._put(fetch, turn)

    def _start(self) -> None:
        while (fetch := self._next()) is not None:
            self._running[fetch] = asyncio.create_task(self._run(fetch))

    def _next(self) -> Fetch | None:
        """Who is fetched now. While the registry is away only what a request asks for is tried."""
        for turn, queue in self._queues.items():
            may = turn is Turn.WAITED_FOR or not self._away
            if queue and may and len(self._running) < AT_ONCE[turn]:
                return queue.popitem(last=False)[0]
        return None

    async def _run(self, fetch: Fetch) -> None:
        artefact, why = None, ""
        try:
            artefact = await self._get(fetch.task, fetch.number, fetch.digest)
        except (RegistryUnreachableError, StoreUnavailableError) as error:
            self._try_later(fetch, str(error))
            return
        except (RegistryError, OSError) as error:
            why = str(error) or type(error).__name__
        except Exception as error:  # whatever it was: others wait behind it
            logger.exception("fetching %s@%d failed", fetch.task, fetch.number)
            why = str(error) or type(error).__name__
        finally:
            del self._running[fetch]
        if artefact is not None:
            self._told = False
        if self._is_wanted(fetch):
            del self._fetches[fetch.task][fetch.number]
            self._arrived(fetch, artefact, why)
            fetch.tried.set_result(why)
        self._start()

    def _try_later(self, fetch: Fetch, why: str) -> None:
        """The registry is away: who waits hears so, and all goes on when it answers again."""
        if not self._told:  # a registry that answers may miss its bucket, and is asked again and again
            logger.warning("%s; adapters are fetched when that is mended", why)
        self._away = self._told = True
        if self._is_wanted(fetch):
            tried, fetch.tried = fetch.tried, asyncio.get_running_loop().create_future()
            self._put(fetch, Turn.SOON)
            tried.set_result(why)
        self._start()

    def _is_wanted(self, fetch: Fetch) -> bool:
        return self._fetches.get(fetch.task, {}).get(fetch.number) is fetch
