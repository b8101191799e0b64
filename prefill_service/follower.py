"""Following the adapter registry: what answers there is served here, what is new there is probed here.

Each state that it tells becomes the catalogue and the key ring; asking for the next one says that it has, and
names what could not be had.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Set
from random import uniform

from adapter_registry.client import DEFAULT_WAIT, AsyncRegistryClient
from adapter_registry.client_calls import MOST_TROUBLES, UNTOLD
from adapter_registry.errors import RegistryError, RegistryUnreachableError, StoreUnavailableError
from adapter_registry.messages import RoutingState, TaskRoute, VersionRoute
from adapter_registry.routing import Routing
from adapter_registry.versions import State
from prad.artefact import Artefact
from prefill_service.catalogue import AGAIN_S, KeyRing, TaskCatalogue, TaskVersions
from prefill_service.prompt import TaskVersion

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_FETCHES = 8
"""Adapters that are fetched at once."""
_WARM_S = 4.0
"""How long versions may take to come into memory on request: other changes wait for that."""

Probe = Callable[[Artefact], Awaitable[None]]
Load = Callable[[Artefact], Awaitable[None]]


class RegistryFollower:
    """`probe` runs an artefact on the model; whatever it raises fails the version. `load` brings its adapter
    into memory, where it stays as others do."""

    def __init__(
        self,
        client: AsyncRegistryClient,
        catalogue: TaskCatalogue,
        keys: KeyRing,
        probe: Probe,
        load: Load,
        weights: str | None = None,
    ) -> None:
        """`weights`: digest of those that an adapter must have been trained on; None: of any."""
        self._client = client
        self._catalogue = catalogue
        self._keys = keys
        self._probe = probe
        self._load = load
        self._weights = weights
        self._known: dict[tuple[str, int], TaskVersion] = {}
        self._routings: dict[str, Routing] = {}
        self._troubles: dict[str, str] = {}  # what cannot be had here, and why
        self._foreign: dict[str, str] = {}  # what is for another model, and nothing here is in its place
        self._cold: dict[str, str] = {}  # what did not come into memory when that was asked for, and why
        self._state: RoutingState | None = None
        self._in_force = 0  # the last revision of which everything could be had

    async def run(self) -> None:
        """Follows until cancelled. While the registry is away, the tasks known last go on being served."""
        away = False
        while True:
            try:
                state = await self._next_state()
                if state.keys is None:  # there may be some: nobody is let in as if there were none
                    raise RegistryError("the registry tells keys to those alone who show its replica secret")
                self._keys.replace(state.keys)  # before what takes long: a key that is revoked ends at once
                if await self._adopt(state):
                    self._in_force = state.revision
                await self._warm(state)
                if self._state is None:  # now it is known which adapters on disk are in use
                    await self._client.tidy()
                self._state, self._catalogue.trouble = state, None
                away = False
            except RegistryError as error:  # away, or it refuses what replicas ask
                if not away:
                    logger.warning("%s; new versions are not seen until that is mended", error)
                away = True
                await asyncio.sleep(_RETRY_S * uniform(0.5, 1.5))
            except Exception:  # whatever it was: the tasks known last go on being served
                logger.exception("following the adapter registry failed")
                await asyncio.sleep(_RETRY_S * uniform(0.5, 1.5))

    async def _next_state(self) -> RoutingState:
        """Waits for a change; what could not be had the last time is tried again sooner.

        Asking tells the registry which revision is in force here, so it comes after everything else.
        """
        if self._state is None:
            return await self._client.state()
        after = self._state.revision
        wait = DEFAULT_WAIT if self._in_force == after else AGAIN_S
        told = self._told()
        state = await self._client.changes(after, wait, in_force=self._in_force, troubles=told)
        return state or self._state

    def _told(self) -> list[str]:
        """What could not be had. Few are told, so first what somebody waits for; and if some of that is left
        out, that it is: what nothing is said of is taken for there."""
        known = self._cold | self._troubles | self._foreign
        told = [f"{name}: {why}" for name, why in known.items()]
        if (untold := len(self._cold) - MOST_TROUBLES) > 0:
            told[MOST_TROUBLES - 1] = f"{UNTOLD}{untold + 1} that this service's log names"
        return told[:MOST_TROUBLES]

    async def _adopt(self, state: RoutingState) -> bool:
        """Serves what answers in `state`, and probes one version that is new: its report is a change, with
        which the next one's turn comes. Says whether everything could be had that is for this model."""
        self._troubles = {}
        known = await self._learn(state)
        tasks, routings = {}, {}
        for route in state.tasks:
            versions, missing = {}, {}
            foreign = {v.version: why for v in route.versions if (why := self._foreign_to(v))}
            for version in route.versions:
                number, name = version.version, f"{route.task}@{version.version}"
                if (found := known.get((route.task, number))) is not None:
                    versions[number] = found
                elif version.state.answers:
                    missing[number] = foreign.get(number) or self._troubles[name]
            if route.versions:  # one without any says so to requests
                routing = routings[route.task] = self._routing(route, versions, foreign.keys())
                tasks[route.task] = TaskVersions.of(routing, versions, missing)
        unserved = self._unserved(state, routings)
        for name in unserved.keys() - self._foreign.keys():
            logger.error("%s is not served: %s", name, unserved[name])
        self._known, self._routings, self._foreign = known, routings, unserved
        self._catalogue.replace(tasks)
        for route in state.tasks:
            for version in route.versions:
                if version.state is not State.PUSHED or self._foreign_to(version):
                    continue  # what is for another model is verified where that is served
                if await self._verify(route.task, version):
                    return not self._troubles
        return not self._troubles

    async def _warm(self, state: RoutingState) -> None:
        """Loads what somebody asked to since the state before. Not what was asked for before this service
        followed: that was of others, or of it in an earlier life."""
        self._cold = {}
        if self._state is None:
            return
        wanted = [
            (route.task, v)
            for route in state.tasks
            for v in route.versions
            if v.warmed > self._state.revision and v.state.answers
        ]
        latest = asyncio.get_running_loop().time() + _WARM_S
        for task, version in wanted:
            name, known = f"{task}@{version.version}", self._known.get((task, version.version))
            if known is None:
                self._cold[name] = self._foreign_to(version) or self._troubles[name]
                continue
            try:
                async with asyncio.timeout_at(latest):
                    await self._load(known.artefact)
            except TimeoutError:
                self._cold[name] = f"there was no room in memory within {_WARM_S:g} s"
            except Exception as error:
                self._cold[name] = str(error) or type(error).__name__
        for name, why in self._cold.items():
            logger.warning("%s did not come into memory: %s", name, why)

    def _routing(self, route: TaskRoute, versions: Mapping[int, TaskVersion], foreign: Set[int]) -> Routing:
        """The task's, if all that it names for this model can be had here; else the one before, if that is so
        of it."""

        def had(routing: Routing) -> bool:
            of_others = bool(routing.split) and routing.split.keys() <= foreign
            return not of_others and routing.named - foreign <= versions.keys()

        now, before = route.routing.where(foreign), self._routings.get(route.task)
        if before is None or not before.named or had(now):
            return now
        return before if had(before) else now

    async def _learn(self, state: RoutingState) -> dict[tuple[str, int], TaskVersion]:
        """What answers and is for this model, with its files, fetched if these are not here yet, some at a
        time; without what cannot be had."""
        places = asyncio.Semaphore(_FETCHES)

        async def learn(task: str, version: VersionRoute) -> TaskVersion | None:
            async with places:
                artefact = await self._fetch(task, version)
            return None if artefact is None else TaskVersion(task, version.version, version.digest, artefact)

        found: dict[tuple[str, int], TaskVersion] = {}
        new = {}
        for task, version in ((route.task, version) for route in state.tasks for version in route.versions):
            if version.state.answers and not self._foreign_to(version):
                name = (task, version.version)
                known = self._known.get(name)
                if known is not None and known.digest == version.digest:
                    found[name] = known
                else:
                    new[name] = asyncio.create_task(learn(task, version))
        try:
            learned = await asyncio.gather(*new.values())
        finally:  # the registry went away: all of it is for the next time
            for fetching in new.values():
                fetching.cancel()
        return found | {name: each for name, each in zip(new, learned, strict=True) if each is not None}

    def _foreign_to(self, version: VersionRoute) -> str:
        """Why a version is not for the model that is served here, if so."""
        if self._weights in (None, version.base.weights):
            return ""
        return (
            f"trained on weights {version.base.weights[:12]} of {version.base.name}, the model has "
            f"{str(self._weights)[:12]}: serve that model, or retire this version"
        )

    def _unserved(self, state: RoutingState, routings: Mapping[str, Routing]) -> dict[str, str]:
        """What operators should hear of what is for another model: that it was pushed, so that others have to
        verify it, and that plain `task` means nothing else here. What was pushed last comes first: somebody
        may wait for it."""
        pushed, meant = [], {}
        for route in state.tasks:
            for version in route.versions:
                if not (why := self._foreign_to(version)):
                    continue
                name = f"{route.task}@{version.version}"
                if version.state is State.PUSHED:
                    pushed.append((version.pushed_at, name, why))
                elif version.version in routings[route.task].split:
                    meant[name] = why
        return {name: why for _, name, why in sorted(pushed, reverse=True)} | meant

    async def _verify(self, task: str, version: VersionRoute) -> bool:
        """Loads and runs a pushed version, and reports how that went; False if its files cannot be had."""
        clock = asyncio.get_running_loop().time
        start = clock()
        artefact = await self._fetch(task, version)
        if artefact is None:
            return False
        fetched, reason = clock(), ""
        try:
            if task == self._catalogue.base_name:
                raise ValueError(f"'{task}' is the plain model's name here; push it as another task")
            await self._probe(artefact)
        except Exception as error:  # the files are anybody's: no way to fail may end the service
            reason = str(error) or type(error).__name__
        took = (1e3 * (fetched - start), 1e3 * (clock() - fetched))
        said = "probed %s@%d: %s (fetched in %.1f ms, loaded and run in %.1f ms)"
        logger.info(said, task, version.version, reason or "ok", *took)
        try:
            await self._client.probe(task, version.version, ok=not reason, reason=reason)
        except (RegistryUnreachableError, StoreUnavailableError):
            raise
        except RegistryError as error:  # retired meanwhile
            logger.info("the probe of %s@%d is moot: %s", task, version.version, error)
        return True

    async def _fetch(self, task: str, version: VersionRoute) -> Artefact | None:
        """None, and a line in the log, if the files of the version's digest cannot be had."""
        try:
            return await self._client.fetch(task, version.version, version.digest)
        except (RegistryUnreachableError, StoreUnavailableError):
            raise
        except (RegistryError, OSError) as error:
            logger.error("%s@%d cannot be had: %s", task, version.version, error)
            self._troubles[f"{task}@{version.version}"] = str(error)
            return None
