"""The tasks that can be served now: what new requests are resolved against, and who keeps it true.

The catalogue is replaced whole at each change. The follower follows the adapter registry: what answers there
is served here, what is new there is probed here.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import uniform

from adapter_registry.api import RoutingState, VersionRoute
from adapter_registry.client import DEFAULT_WAIT, AsyncRegistryClient
from adapter_registry.errors import RegistryError, RegistryUnreachableError
from adapter_registry.versions import State
from prad.artefact import Artefact
from prefill_service.api.protocols import TaskEntry
from prefill_service.errors import UnknownModelError
from prefill_service.generation import TaskVersion

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_AGAIN_S = 5.0
_NAMED = 8  # tasks that an error message lists


@dataclass(frozen=True, slots=True)
class TaskVersions:
    """One task: the version that its plain name means (None: only explicit ones), and all that answer."""

    current: int | None
    versions: Mapping[int, TaskVersion]


class TaskCatalogue:
    """Implements `prefill_service.api.protocols.Catalogue`."""

    def __init__(self, base_name: str) -> None:
        self._base_name = base_name
        self._tasks: Mapping[str, TaskVersions] = {}

    @property
    def base_name(self) -> str:
        return self._base_name

    def replace(self, tasks: Mapping[str, TaskVersions]) -> None:
        """From now on new requests see `tasks`; running ones keep what they resolved."""
        self._tasks = dict(tasks)

    def resolve(self, task: str, version: int | None) -> TaskVersion:
        found = self._tasks.get(task)
        if found is None:
            known = ", ".join(sorted(self._tasks)[:_NAMED]) or "none yet"
            raise UnknownModelError(
                f"there is no task or model '{task}' (tasks: {known}; the plain model: {self._base_name})"
            )
        wanted = found.current if version is None else version
        if wanted is not None and wanted in found.versions:
            return found.versions[wanted]
        answering = ", ".join(f"{task}@{v}" for v in sorted(found.versions)) or "none"
        if version is None:
            raise UnknownModelError(f"task '{task}' has no current version (it answers as: {answering})")
        raise UnknownModelError(f"there is no {task}@{version} (it answers as: {answering})")

    def tasks(self) -> Sequence[TaskEntry]:
        return [
            TaskEntry(name, task.versions[task.current], tuple(sorted(task.versions)))
            for name, task in sorted(self._tasks.items())
            if task.current is not None and task.current in task.versions
        ]


Probe = Callable[[Artefact], Awaitable[None]]


class RegistryFollower:
    """`probe` runs an artefact on the model; whatever it raises fails the version."""

    def __init__(self, client: AsyncRegistryClient, catalogue: TaskCatalogue, probe: Probe) -> None:
        self._client = client
        self._catalogue = catalogue
        self._probe = probe
        self._known: dict[tuple[str, int], TaskVersion] = {}
        self._state: RoutingState | None = None
        self._complete = True

    @property
    def trouble(self) -> str | None:
        """Why no task can be served yet; None once the registry has answered."""
        return "the adapter registry has not answered yet" if self._state is None else None

    async def run(self) -> None:
        """Follows until cancelled. While the registry is away, the tasks known last go on being served."""
        away = False
        while True:
            try:
                state = await self._next_state()
                self._complete = await self._adopt(state)
                self._state = state
                away = False
            except RegistryUnreachableError as error:
                if not away:
                    logger.warning("%s; new versions are not seen until it is back", error)
                away = True
                await asyncio.sleep(_RETRY_S * uniform(0.5, 1.5))
            except Exception:  # whatever it was: the tasks known last go on being served
                logger.exception("following the adapter registry failed")
                await asyncio.sleep(_RETRY_S * uniform(0.5, 1.5))

    async def _next_state(self) -> RoutingState:
        """Waits for a change; what could not be had the last time is tried again sooner."""
        if self._state is None:
            return await self._client.state()
        wait = DEFAULT_WAIT if self._complete else _AGAIN_S
        return await self._client.changes(self._state.revision, wait) or self._state

    async def _adopt(self, state: RoutingState) -> bool:
        """Serves what answers in `state`, and probes one version that is new: its report is a change, with
        which the next one's turn comes. Says whether everything could be had."""
        complete = True
        known = {}
        tasks = {}
        for route in state.tasks:
            versions = {}
            for version in route.versions:
                if version.state.answers:
                    found = await self._learn(route.task, version)
                    complete &= found is not None
                    if found is not None:
                        versions[version.version] = known[route.task, version.version] = found
            if versions:
                tasks[route.task] = TaskVersions(route.current, versions)
        self._known = known
        self._catalogue.replace(tasks)
        for route in state.tasks:
            for version in route.versions:
                if version.state is State.PUSHED:
                    if await self._verify(route.task, version):
                        return complete
                    complete = False
        return complete

    async def _learn(self, task: str, version: VersionRoute) -> TaskVersion | None:
        """The version with its files, fetched if these are not here yet."""
        known = self._known.get((task, version.version))
        if known is not None and known.digest == version.digest:
            return known
        artefact = await self._fetch(task, version)
        return None if artefact is None else TaskVersion(task, version.version, version.digest, artefact)

    async def _verify(self, task: str, version: VersionRoute) -> bool:
        """Loads and runs a pushed version, and reports how that went; False if its files cannot be had."""
        artefact = await self._fetch(task, version)
        if artefact is None:
            return False
        reason = ""
        try:
            if task == self._catalogue.base_name:
                raise ValueError(f"'{task}' is the plain model's name here; push it as another task")
            await self._probe(artefact)
        except Exception as error:  # the files are anybody's: no way to fail may end the service
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
        """None, and a line in the log, if the files of the version's digest cannot be had."""
        try:
            return await self._client.fetch(task, version.version, version.digest)
        except RegistryUnreachableError:
            raise
        except (RegistryError, OSError) as error:
            logger.error("%s@%d cannot be had: %s", task, version.version, error)
            return None
