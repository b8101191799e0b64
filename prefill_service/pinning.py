"""Tasks whose adapters an operator wants in memory, so that no request for them waits for a load."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress

from prad.artefact import Artefact
from prefill_service.catalogue import TaskVersions

logger = logging.getLogger(__name__)

EVERY = "*"
AGAIN_S = 30.0


class Pinned:
    """Of these `tasks` (EVERY: of all), what their routing names is loaded when it is here, and leaves memory
    only where nothing else could make room. Follows the catalogue, which is told of each change."""

    def __init__(self, tasks: Collection[str] = ()) -> None:
        self._tasks = frozenset(tasks)
        self._named: dict[str, dict[str, Artefact]] = {}  # by task, by digest
        self._tasks_of = Counter[str]()  # by digest: whoever makes room asks for each adapter in memory
        self._changed = asyncio.Event()

    def __contains__(self, digest: object) -> bool:
        return digest in self._tasks_of

    def follow(self, task: str, routed: TaskVersions | None) -> None:
        """What the task's names mean from now on; None: there is none of the name any more."""
        if not self._tasks & {task, EVERY}:
            return
        for digest in self._named.pop(task, ()):
            self._tasks_of[digest] -= 1
            if not self._tasks_of[digest]:
                del self._tasks_of[digest]
        if routed is not None:
            meant = {*routed.split, *routed.aliases.values()}
            here = [version for number, version in routed.versions.items() if number in meant]
            self._named[task] = {version.digest: version.artefact for version in here}
            self._tasks_of.update(self._named[task].keys())
        self._changed.set()

    async def run(
        self, load: Callable[[Artefact], Awaitable[None]], fits: Callable[[Artefact], bool]
    ) -> None:
        """Loads what is pinned, one at a time, until cancelled; now and then also what left memory since, or
        did not load, if it `fits` beside all others."""
        tried = set[str]()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_S):
                    await self._changed.wait()
            again = not self._changed.is_set()
            self._changed.clear()
            wanted = {d: artefact for named in self._named.values() for d, artefact in named.items()}
            tried &= wanted.keys()
            for digest, artefact in wanted.items():
                if digest in tried and not (again and fits(artefact)):
                    continue
                try:
                    await load(artefact)
                except Exception as error:  # requests for it say the same; the others are loaded
                    logger.warning("a pinned adapter did not come into memory: %s", error)
                tried.add(digest)
