"""Verifying pushed versions beside following the registry, one at a time: each is fetched, probed, reported.

Whoever follows waits for none of it: a promotion, a rollback or a revoked key is in force while a probe runs.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from adapter_registry.client import AsyncRegistryClient
from adapter_registry.errors import RegistryError, RegistryUnreachableError, StoreUnavailableError
from adapter_registry.messages import RoutingState, VersionRoute
from prad.artefact import Artefact
from prefill_service.catalogue import AGAIN_S

logger = logging.getLogger(__name__)

Probe = Callable[[Artefact], Awaitable[None]]


class Verifier:
    """`probe` runs an artefact on the model; whatever it raises fails the version. `base_name`: the plain
    model's, which no task may have."""

    def __init__(self, client: AsyncRegistryClient, probe: Probe, base_name: str) -> None:
        self._client = client
        self._probe = probe
        self._base_name = base_name
        self._at = (0, "")  # the state that was told last, by its revision and mark
        self._pushed: dict[str, tuple[str, VersionRoute]] = {}
        self._reported: set[str] = set()  # since that state: the next one says what became of it
        self._troubles: dict[str, str] = {}
        self._again_at: dict[str, float] = {}
        self._running: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether one is being verified."""
        return self._running is not None and not self._running.done()

    @property
    def troubles(self) -> Mapping[str, str]:
        """By name: what cannot be verified for now, and why."""
        return self._troubles

    def follow(self, state: RoutingState, pushed: Iterable[tuple[str, VersionRoute]]) -> None:
        """From now on these are to be verified, each of a task. What could not be is tried again some seconds
        after the last time, when this is called."""
        if (at := (state.revision, state.mark)) != self._at:
            self._at = at
            self._reported.clear()
        self._pushed = {f"{task}@{version.version}": (task, version) for task, version in pushed}
        self._troubles = {name: why for name, why in self._troubles.items() if name in self._pushed}
        self._again_at = {name: self._again_at[name] for name in self._troubles}
        if not self.busy and self._next() is not None:
            self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends what is under way. A probe that computes already is not waited for."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    def _next(self) -> str | None:
        now = asyncio.get_running_loop().time()
        for name in self._pushed:
            if name not in self._reported and self._again_at.get(name, now) <= now:
                return name
        return None

    async def _run(self) -> None:
        while (name := self._next()) is not None:
            await self._verify(name, *self._pushed[name])

    async def _verify(self, name: str, task: str, version: VersionRoute) -> None:
        clock = asyncio.get_running_loop().time
        start = clock()
        try:
            artefact = await self._client.fetch(task, version.version, version.digest)
        except Exception as error:  # whatever it was: others wait behind it
            self._put_off(name, error)
            return
        fetched = clock()
        reason = await self._probed(task, artefact)
        took = (1e3 * (fetched - start), 1e3 * (clock() - fetched))
        said = "probed %s: %s (fetched in %.1f ms, loaded and run in %.1f ms)"
        logger.info(said, name, reason or "ok", *took)
        try:
            await self._client.probe(task, version.version, ok=not reason, reason=reason)
        except (RegistryUnreachableError, StoreUnavailableError) as error:
            self._put_off(name, error)
            return
        except RegistryError as error:  # retired meanwhile
            logger.info("the probe of %s is moot: %s", name, error)
        self._reported.add(name)
        self._troubles.pop(name, None)
        self._again_at.pop(name, None)

    async def _probed(self, task: str, artefact: Artefact) -> str:
        """Why the version fails; empty: it passes."""
        try:
            if task == self._base_name:
                raise ValueError(f"'{task}' is the plain model's name here; push it as another task")
            await self._probe(artefact)
        except Exception as error:  # the files are anybody's: no way to fail may end the service
            return str(error) or type(error).__name__
        return ""

    def _put_off(self, name: str, error: Exception) -> None:
        known, why = isinstance(error, RegistryError | OSError), str(error) or type(error).__name__
        if self._troubles.get(name) != why:  # it is tried again every few seconds
            logger.error("%s cannot be verified: %s", name, why, exc_info=None if known else error)
        if name in self._pushed:  # still
            self._troubles[name] = why
            self._again_at[name] = asyncio.get_running_loop().time() + AGAIN_S
