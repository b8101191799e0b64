"""Following the adapter registry: what answers there is served here, what is new there is probed here.

What it tells becomes the catalogue and the key ring; asking what changes next says that it has, how much is
still on its way (`fetching.py`), and names what could not be had, or not be verified (`verifying.py`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from random import uniform

from adapter_registry.client import DEFAULT_WAIT, AsyncRegistryClient
from adapter_registry.client_calls import MOST_TROUBLES, UNTOLD, Progress
from adapter_registry.errors import RegistryError
from adapter_registry.messages import RoutingState, TaskRoute, VersionRoute
from adapter_registry.routing import Routing
from adapter_registry.versions import State
from prad.artefact import Artefact
from prefill_service.catalogue import AGAIN_S, KeyRing, TaskCatalogue, TaskVersions
from prefill_service.fetching import Fetch, Fetches, Turn
from prefill_service.prompt import TaskVersion
from prefill_service.verifying import Probe, Verifier

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_FETCH_S = 4.0
"""How long what a change names may take to come here: other changes wait for that."""
_TELL_S = 1.0
"""Between two reports of how much is still on its way."""
_WARM_S = 4.0
"""How long versions may take to come into memory on request: other changes wait for that."""

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
        *,
        most_waiting: int = 1024,
        patience_s: float = 60.0,
    ) -> None:
        """`weights`: digest of those that an adapter must have been trained on; None: of any. `most_waiting`:
        requests that may wait for adapters that are not here yet; `patience_s`: for how long each."""
        self._client = client
        self._catalogue = catalogue
        self._keys = keys
        self._verifier = Verifier(client, probe, catalogue.base_name)
        self._load = load
        self._weights = weights
        self._fetches = Fetches(client.fetch, self._arrived, most_waiting=most_waiting, patience_s=patience_s)
        self._routes: dict[str, TaskRoute] = {}
        self._known: dict[str, dict[int, TaskVersion]] = {}  # what is here, by task
        self._routings: dict[str, Routing] = {}
        self._behind: set[str] = set()  # tasks where a routing before is in force still
        self._troubles: dict[str, dict[int, str]] = {}  # what cannot be had here, and why
        self._logged: dict[
            str, dict[int, str]
        ] = {}  # of that, what the log says: it is tried again and again
        self._foreign: dict[str, str] = {}  # what is for another model, and nothing here is in its place
        self._cold: dict[str, str] = {}  # what did not come into memory when that was asked for, and why
        self._again_at = 0.0
        self._tidied = False
        self._state: RoutingState | None = None
        self._in_force = 0  # the last revision of which everything was here

    async def run(self) -> None:
        """Follows until cancelled. While the registry is away, the tasks known last go on being served."""
        away = False
        try:
            while True:
                try:
                    await self._follow()
                    away = False
                except RegistryError as error:  # away, or it refuses what replicas ask
                    if not away:
                        logger.warning("%s; new versions are not seen until that is mended", error)
                    away = True
                    await asyncio.sleep(_RETRY_S * uniform(0.5, 1.5))
                except Exception:  # whatever it was: the tasks known last go on being served
                    logger.exception("following the adapter registry failed")
                    await asyncio.sleep(_RETRY_S * uniform(0.5, 1.5))
        finally:
            self._fetches.close()
            await self._verifier.close()

    async def _follow(self) -> None:
        """From one state to the next."""
        told = await self._next_told()
        state = told if self._state is None else told.on(self._state)
        if state.keys is None:  # there may be some: nobody is let in as if there were none
            raise RegistryError("the registry tells keys to those alone who show its replica secret")
        self._keys.replace(state.keys)  # before what takes long: a key that is revoked ends at once
        self._fetches.go_on()
        if self._state is not None and state.revision < self._state.revision:
            self._in_force = 0  # of a history that is gone
        await self._adopt(state, told)
        self._verifier.follow(state, self._to_be_verified(state))
        await self._warm(state)
        if not (self._tidied or self._fetches or self._verifier.busy):
            # now it is known which adapters on disk are in use
            await self._client.tidy()
            self._tidied = True
        self._state = state

    async def _next_told(self) -> RoutingState:
        """What changed, once something did, or it is time to try again what could not be had.

        Asking tells the registry how far this service is, so it comes after everything else.
        """
        known = self._state
        if known is None:
            return await self._client.state()
        progress = self._progress(known.revision)
        all_here = progress.in_force == known.revision and not self._verifier.troubles
        wait = DEFAULT_WAIT if all_here else AGAIN_S
        wait = min(wait, _TELL_S) if self._fetches or self._verifier.busy else wait
        told = await self._client.changes(known.revision, wait, mark=known.mark, progress=progress)
        if told is None:
            return known.unchanged()
        if told.since not in (None, known.revision):  # it goes on from what is not known here
            return await self._client.state()
        return told

    def _progress(self, revision: int) -> Progress:
        """What operators may rely on. If some of what is fetched in the background cannot be had in the end,
        it is the revision before again of which everything could."""
        if self._troubles or self._behind:
            return Progress(self._in_force, len(self._fetches), self._told())
        if not self._fetches:
            self._in_force = revision
        return Progress(revision, len(self._fetches), self._told())

    def _told(self) -> list[str]:
        """What could not be had. Few are told, so first what somebody waits for; and if some of that is left
        out, that it is: what nothing is said of is taken for there."""
        troubles = {f"{t}@{number}": why for t, its in self._troubles.items() for number, why in its.items()}
        whys = self._cold | troubles | dict(self._verifier.troubles) | self._foreign
        told = [f"{name}: {why}" for name, why in whys.items()]
        if (untold := len(self._cold) - MOST_TROUBLES) > 0:
            told[MOST_TROUBLES - 1] = f"{UNTOLD}{untold + 1} that this service's log names"
        return told[:MOST_TROUBLES]

    async def _adopt(self, state: RoutingState, told: RoutingState) -> None:
        """Serves what answers in `state`, of which `told` is what changed. At the start that is at once:
        requests wait for what is not here yet. Later what is new is waited for, some seconds at most."""
        first = self._state is None
        changed = {route.task: route for route in told.tasks}
        if told.since is None:
            self._forget(self._routes.keys() - changed.keys())
        changed = self._to_be_tried_again(state.revision) | changed
        self._routes |= changed
        wanted = list[Fetch]()
        for task, route in changed.items():
            self._troubles.pop(task, None)
            wanted += self._want(route, Turn.LATER if first else Turn.SOON)
            self._put_in_force(route)
        unserved = self._unserved(state, self._routings)
        for name in unserved.keys() - self._foreign.keys():
            logger.error("%s is not served: %s", name, unserved[name])
        self._foreign = unserved
        self._catalogue.trouble = None
        await self._fetches.settled(wanted, _TELL_S if first else _FETCH_S)

    def _to_be_tried_again(self, revision: int) -> dict[str, TaskRoute]:
        """Tasks of which something could not be had: at a change, or some seconds after the last time."""
        now = asyncio.get_running_loop().time()
        if self._state is not None and self._state.revision == revision and now < self._again_at:
            return {}
        self._again_at = now + AGAIN_S
        return {task: self._routes[task] for task in self._troubles}

    def _forget(self, tasks: Iterable[str]) -> None:
        """The registry does not know them any more."""
        for task in tasks:
            self._fetches.want(task, (), Turn.LATER)
            for known in (self._routes, self._known, self._routings, self._troubles, self._logged):
                known.pop(task, None)
            self._behind.discard(task)
            self._catalogue.update(task, None)

    def _want(self, route: TaskRoute, turn: Turn) -> Sequence[Fetch]:
        """Has fetched what answers, is for this model and not here yet; keeps nothing else of the task."""
        answering = {v.version: v for v in route.versions if v.state.answers and not self._foreign_to(v)}
        here = self._known.get(route.task, {})
        known = {n: v for n, v in here.items() if n in answering and answering[n].digest == v.digest}
        self._known[route.task] = known
        return self._fetches.want(route.task, [v for n, v in answering.items() if n not in known], turn)

    def _arrived(self, fetch: Fetch, artefact: Artefact | None, why: str) -> None:
        task, number = fetch.task, fetch.number
        logged = self._logged.setdefault(task, {})
        if artefact is None:
            if logged.get(number) != why:
                logger.error("%s@%d cannot be had: %s", task, number, why)
            logged[number] = why
            self._troubles.setdefault(task, {})[number] = why
        else:
            logged.pop(number, None)
            self._known[task][number] = TaskVersion(task, number, fetch.digest, artefact)
        self._put_in_force(self._routes[task])

    def _put_in_force(self, route: TaskRoute) -> None:
        """What requests for the task get from now on."""
        task, known, foreign = route.task, self._known[route.task], dict[int, str]()
        troubles, missing = self._troubles.get(route.task, {}), dict[int, str]()
        for version in route.versions:
            if why := self._foreign_to(version):
                foreign[version.version] = why
            if version.state.answers and (why := why or troubles.get(version.version, "")):
                missing[version.version] = why
        routing = self._routing(route, known, foreign.keys())
        (self._behind.discard if routing.revision == route.routing.revision else self._behind.add)(task)
        if route.versions:  # one without any says so to requests
            self._routings[task] = routing
            routed = TaskVersions.of(routing, dict(known), missing, self._fetches.of(task))
            self._catalogue.update(task, routed)

    def _to_be_verified(self, state: RoutingState) -> Iterator[tuple[str, VersionRoute]]:
        """What is for another model is verified where that is served."""
        for route in state.tasks:
            for version in route.versions:
                if version.state is State.PUSHED and not self._foreign_to(version):
                    yield route.task, version

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
            name, known = f"{task}@{version.version}", self._known[task].get(version.version)
            if known is None:
                trouble = self._troubles.get(task, {}).get(version.version, "it is still on its way")
                self._cold[name] = self._foreign_to(version) or trouble
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
        of it, or the task's would take away more than it brings."""
        now, before = route.routing.where(foreign), self._routings.get(route.task)
        if before is None or not before.named or not (lacking := _lacking(now, versions.keys(), foreign)):
            return now
        lacked = _lacking(before, versions.keys(), foreign)
        if not lacked:
            return before
        taken = (lacking - lacked) & {None, *before.aliases}
        brought = (lacked - lacking) & {None, *now.aliases}
        answering = {version.version for version in route.versions if version.state.answers}
        keeps = (None in taken or not brought) and before.named - foreign <= answering
        return before if taken and keeps else now

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


def _lacking(routing: Routing, here: Set[int], foreign: Set[int]) -> Set[str | None]:
    """The names, None for plain `task`, that mean something for this model that is not here; plain `task`
    also if it means nothing for this model."""
    names = {name for name, number in routing.aliases.items() if number not in foreign and number not in here}
    split = routing.split.keys()
    plain = bool(split - foreign - here) or (bool(split) and split <= foreign)
    return names | ({None} if plain else set[None]())
