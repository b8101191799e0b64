"""Follows the adapter registry: what answers there is served here, what is new there is probed here."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from adapter_registry.api import RoutingState, TaskRoute, VersionRoute
from adapter_registry.client import AsyncRegistryClient
from adapter_registry.errors import RegistryError, RegistryUnreachableError
from adapter_registry.versions import State
from prad.adapters import AdapterError
from prad.artefact import Artefact, ArtefactError
from prad.lm import ModelError
from prefill_service.catalogue import TaskCatalogue, TaskVersions
from prefill_service.generation import TaskVersion

logger = logging.getLogger(__name__)

_RETRY_S = 0.5

Probe = Callable[[Artefact], Awaitable[None]]


class RegistryFollower:
    """`probe` runs an artefact on the model, or raises AdapterError, ArtefactError or ModelError."""

    def __init__(self, client: AsyncRegistryClient, catalogue: TaskCatalogue, probe: Probe) -> None:
        self._client = client
        self._catalogue = catalogue
        self._probe = probe
        self._known: dict[tuple[str, int], TaskVersion] = {}
        self._revision: int | None = None
        self._settled = False

    @property
    def trouble(self) -> str | None:
        """Why no task can be served yet; None once the registry has answered."""
        return "the adapter registry has not answered yet" if self._revision is None else None

    async def run(self) -> None:
        """Follows until cancelled. While the registry is away, the tasks known last go on being served."""
        away = False
        while True:
            try:
                state = await self._next_state()
                away = away and state is None
                if state is not None:
                    self._settled = await self._adopt(state)
                    self._revision = state.revision
            except RegistryUnreachableError as error:
                if not away:
                    logger.warning("%s; new versions are not seen until it is back", error)
                away, self._settled = True, False
            except RegistryError as error:
                logger.error("the adapter registry refused: %s", error)
                self._settled = False
            if not self._settled:
                await asyncio.sleep(_RETRY_S)

    async def _next_state(self) -> RoutingState | None:
        if self._revision is None or not self._settled:
            return await self._client.state()
        return await self._client.changes(self._revision)

    async def _adopt(self, state: RoutingState) -> bool:
        """Serves what answers in `state` and probes what is new; says whether all of it could be had."""
        complete = True
        tasks = {}
        for route in state.tasks:
            complete &= await self._learn(route)
            versions = {
                v.version: self._known[route.task, v.version]
                for v in route.versions
                if v.state.answers and (route.task, v.version) in self._known
            }
            if versions:
                tasks[route.task] = TaskVersions(route.current, versions)
        self._catalogue.replace(tasks)
        for route in state.tasks:
            for version in route.versions:
                if version.state is State.PUSHED:
                    complete &= await self._verify(route.task, version)
        return complete

    async def _learn(self, route: TaskRoute) -> bool:
        """Fetches the route's answering versions that are not here yet."""
        complete = True
        for version in route.versions:
            key = (route.task, version.version)
            if version.state.answers and key not in self._known:
                artefact = await self._fetch(route.task, version)
                if artefact is None:
                    complete = False
                else:
                    self._known[key] = TaskVersion(*key, version.digest, artefact)
        return complete

    async def _verify(self, task: str, version: VersionRoute) -> bool:
        """Loads and runs a pushed version, and reports how that went; False if its files cannot be had."""
        artefact = await self._fetch(task, version)
        if artefact is None:
            return False
        reason = ""
        try:
            await self._probe(artefact)
        except (AdapterError, ArtefactError, ModelError) as error:
            reason = str(error) or type(error).__name__
        logger.info("probed %s@%d: %s", task, version.version, reason or "ok")
        try:
            await self._client.probe(task, version.version, ok=not reason, reason=reason)
        except RegistryUnreachableError:
            raise
        except RegistryError as error:  # retired meanwhile
            logger.info("the probe of %s@%d is moot: %s", task, version.version, error)
        return True

    async def _fetch(self, task: str, version: VersionRoute) -> Artefact | None:
        """None, and a line in the log, if the registry cannot give the files of the version's digest."""
        try:
            return await self._client.fetch(task, version.version, version.digest)
        except RegistryUnreachableError:
            raise
        except RegistryError as error:
            logger.error("%s@%d cannot be served: %s", task, version.version, error)
            return None
