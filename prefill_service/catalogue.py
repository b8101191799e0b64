"""What the registry says, as it is in force here: which version a request gets, and who may ask, how much.

Catalogue and key ring are replaced whole at each change. The follower follows the adapter registry: what
answers there is served here, what is new there is probed here.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b, sha256
from math import log
from random import uniform
from types import MappingProxyType

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from adapter_registry.api import RoutingState, TaskRoute, VersionRoute
from adapter_registry.client import DEFAULT_WAIT, AsyncRegistryClient
from adapter_registry.errors import RegistryError, RegistryUnreachableError, StoreUnavailableError
from adapter_registry.keys import StoredKey
from adapter_registry.names import PREVIOUS
from adapter_registry.routing import Routing
from adapter_registry.versions import State
from prad.artefact import Artefact
from prefill_service.errors import (
    InvalidKeyError,
    InvalidRequestError,
    NotReadyError,
    RateLimitedError,
    TaskNotAllowedError,
    UnknownModelError,
)
from prefill_service.prompt import TaskVersion

logger = logging.getLogger(__name__)

_RETRY_S = 0.5
_AGAIN_S = 5.0
_NOTHING: Mapping[int, str] = MappingProxyType({})
_NAMED = 8  # tasks that an error message lists


@dataclass(frozen=True, slots=True)
class TaskVersions:
    """One task: the versions that answer, and what its names mean, of the registry's routing. `missing`: what
    answers by the registry and cannot be had here, and why."""

    versions: Mapping[int, TaskVersion]
    split: Mapping[int, int]
    aliases: Mapping[str, int]
    default: int | None
    revision: int
    missing: Mapping[int, str]

    @classmethod
    def of(
        cls, routing: Routing, versions: Mapping[int, TaskVersion], missing: Mapping[int, str] = _NOTHING
    ) -> "TaskVersions":
        previous = {} if routing.previous is None else {PREVIOUS: routing.previous}
        aliases = {**routing.aliases, **previous}
        return cls(versions, routing.split, aliases, routing.default, routing.revision, missing)

    @property
    def aliases_here(self) -> Mapping[str, int]:
        return {name: meant for name, meant in self.aliases.items() if meant in self.versions}

    def answering(self, task: str) -> str:
        """The names, beside the task's own, by which it answers here: a few, in words."""
        names = [*map(str, sorted(self.versions)), *sorted(self.aliases_here)]
        return ", ".join(f"{task}@{name}" for name in names[:_NAMED]) or "none"

    def meant(self, name: int | str | None, task: str, key: str | None) -> int | None:
        """The version that `task@name` means; None: plain `task`. `key`: whose share of a split it is."""
        if name is None:
            return self.default if key is None or len(self.split) < 2 else drawn(task, self.split, key)
        return name if isinstance(name, int) else self.aliases.get(name)


def drawn(task: str, split: Mapping[int, int], key: str) -> int:
    """The version of a split that a sticky key gets: the same here, elsewhere and after a restart.

    Weighted rendezvous hashing: each version has a number in (0, 1] from task, key and version alone, and
    -log of that, divided by its weight, is how late it comes; the first wins. So it is drawn in proportion to
    its weight, and one whose weight grows beside the others' takes keys over and gives none away.
    """

    def lateness(version: int) -> float:
        digest = blake2b(f"{task}\0{version}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
        return -log((int.from_bytes(digest) + 1) / 2**64) / split[version]

    return min(split, key=lambda version: (lateness(version), version))


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """One task as `/v1/models` lists it: by its default version. `routed`: what its names mean."""

    name: str
    default: TaskVersion
    routed: TaskVersions


class TaskCatalogue:
    """What new requests are resolved against; none of its methods waits for anything. `base_name`: the id
    under which clients name the plain model. `trouble`: why it is not to be relied on yet; None if it is."""

    def __init__(self, base_name: str) -> None:
        self.base_name = base_name
        self.trouble: str | None = "the adapter registry has not answered yet"
        self._tasks: Mapping[str, TaskVersions] = {}

    def replace(self, tasks: Mapping[str, TaskVersions]) -> None:
        """From now on new requests see `tasks`; running ones keep what they resolved."""
        self._tasks = dict(tasks)

    def resolve(
        self, task: str, name: int | str | None, key: str | None = None, asks: "Client | None" = None
    ) -> tuple[TaskVersion, int]:
        """The version that a new request gets, and the revision of the routing that says so.

        `name`: a version's number, or an alias; None: what plain `task` means, for the sticky `key`, or for
        nobody in particular. Raises UnknownModelError whose message lists a few known tasks that who `asks`
        may use; NotReadyError while the version cannot be had here.
        """
        found = self._tasks.get(task)
        if found is None:
            names = (n for n, t in self._tasks.items() if t.versions and (asks is None or asks.may_use(n)))
            known = ", ".join(sorted(names)[:_NAMED]) or "none yet"
            raise UnknownModelError(
                f"there is no task or model '{task}' (tasks: {known}; the plain model: {self.base_name})"
            )
        wanted = found.meant(name, task, key)
        if wanted is not None and wanted in found.versions:
            return found.versions[wanted], found.revision
        answering = f"(it answers as: {found.answering(task)})"
        if wanted is not None and wanted in found.missing:
            raise NotReadyError(
                f"{task}@{wanted} is not here yet, and is fetched again {answering}: {found.missing[wanted]}",
                retry_after=_AGAIN_S,
            )
        if name is None:
            raise UnknownModelError(f"task '{task}' has no current version {answering}")
        raise UnknownModelError(f"there is no {task}@{name} {answering}")

    def tasks(self) -> Sequence[TaskEntry]:
        return [
            TaskEntry(name, task.versions[task.default], task)
            for name, task in sorted(self._tasks.items())
            if task.default is not None and task.default in task.versions
        ]


_HOW_TO_AUTHORIZE = (
    "send one as 'Authorization: Bearer ...' (OpenAI's clients: api_key; prad's commands: PRAD_API_KEY, or "
    "the file that PRAD_API_KEY_FILE names); an operator makes one: prad keys create NAME"
)


class KeyRing:
    """Which API keys are in force, as the registry has them. What is known stays so while that is away.

    `required`: everyone needs one, also while there is none; else from the first one on.
    """

    def __init__(self, *, required: bool = False) -> None:
        self._required = self._asked_for = required
        self._clients: Mapping[str, Client] = {}
        self._windows = FixedWindowRateLimiter(MemoryStorage())

    def replace(self, keys: Sequence[StoredKey]) -> None:
        """New requests are let in by these; one that is revoked lets nobody in, and still says that keys are
        asked for."""
        known = self._clients
        self._clients = {
            key.sha256: known.get(key.sha256) or Client(key, self._windows)
            for key in keys
            if key.revoked_at is None
        }
        self._asked_for = self._required or bool(keys)

    def client(self, authorization: str | None) -> "Client | None":
        """Who shows a key in that header; None: nobody needs one. Raises InvalidKeyError."""
        if not self._asked_for:
            return None
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer":
            raise InvalidKeyError(f"this server asks for an API key: {_HOW_TO_AUTHORIZE}")
        found = self._clients.get(sha256(token.strip().encode()).hexdigest())
        if found is None:
            raise InvalidKeyError(f"this API key is not known, or was revoked: {_HOW_TO_AUTHORIZE}")
        return found


class Client:
    """Whoever shows a key: what it may use, and what it has used here of its limits. A minute begins with the
    first request in it."""

    def __init__(self, key: StoredKey, windows: FixedWindowRateLimiter) -> None:
        self.name = key.name
        self.tasks = key.tasks
        self._limits = key.limits
        self._windows = windows
        self._in_flight = 0

    def may_use(self, task: str) -> bool:
        """Also the plain model, by its id."""
        return self.tasks is None or task in self.tasks

    def require(self, task: str) -> None:
        """Says the same whether there is such a task or not. Raises TaskNotAllowedError."""
        if not self.may_use(task):
            raise TaskNotAllowedError(
                f"the key {self.name!r} is not for {task!r}; it is for: {', '.join(self.tasks or ())}",
                param="model",
            )

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Held from a request's head to the last byte of its answer. Raises RateLimitedError."""
        most = self._limits.concurrent
        if most is not None and self._in_flight >= most:
            raise RateLimitedError(
                f"the key {self.name!r} has {most} requests under way, as many as it may; wait for one to end"
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def count_request(self) -> None:
        """Raises RateLimitedError."""
        if (most := self._limits.requests_per_minute) is not None:
            await self._consume("requests", 1, most)

    async def count_tokens(self, count: int) -> None:
        """As many as a request may take, before it begins. Raises RateLimitedError, and InvalidRequestError
        if they are more than a minute's."""
        most = self._limits.tokens_per_minute
        if most is None:
            return
        if count > most:
            raise InvalidRequestError(
                f"this request may take {count} tokens (its prompts, and outputs as long as they may get), "
                f"and the key {self.name!r} has {most} a minute: shorten the prompt, or lower max_tokens",
                param="max_tokens",
            )
        await self._consume("tokens", count, most)

    async def _consume(self, what: str, count: int, most: int) -> None:
        """Nothing waits between the test and the hit: nobody comes in between."""
        window = RateLimitItemPerMinute(most)
        if await self._windows.test(window, self.name, what, cost=count):
            await self._windows.hit(window, self.name, what, cost=count)
            return
        ends, left = await self._windows.get_window_stats(window, self.name, what)
        raise RateLimitedError(
            f"the key {self.name!r} may use {most} {what} a minute, of which {left} are left in this one: "
            f"too few for this request, which needs {count}",
            retry_after=max(ends - time.time(), 0.0),
        )


Probe = Callable[[Artefact], Awaitable[None]]


class RegistryFollower:
    """`probe` runs an artefact on the model; whatever it raises fails the version."""

    def __init__(
        self, client: AsyncRegistryClient, catalogue: TaskCatalogue, keys: KeyRing, probe: Probe
    ) -> None:
        self._client = client
        self._catalogue = catalogue
        self._keys = keys
        self._probe = probe
        self._known: dict[tuple[str, int], TaskVersion] = {}
        self._routings: dict[str, Routing] = {}
        self._troubles: dict[str, str] = {}  # what cannot be had here, and why
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
        wait = DEFAULT_WAIT if self._in_force == after else _AGAIN_S
        told = [f"{name}: {why}" for name, why in self._troubles.items()]
        state = await self._client.changes(after, wait, in_force=self._in_force, troubles=told)
        return state or self._state

    async def _adopt(self, state: RoutingState) -> bool:
        """Serves what answers in `state`, and probes one version that is new: its report is a change, with
        which the next one's turn comes. Says whether everything could be had."""
        self._troubles = {}
        known, tasks, routings = {}, {}, {}
        for route in state.tasks:
            versions, missing = {}, {}
            for version in route.versions:
                if version.state.answers:
                    found = await self._learn(route.task, version)
                    if found is not None:
                        versions[version.version] = known[route.task, version.version] = found
                    else:
                        missing[version.version] = self._troubles[f"{route.task}@{version.version}"]
            if versions or missing:
                routings[route.task] = self._routing(route, versions)
                tasks[route.task] = TaskVersions.of(routings[route.task], versions, missing)
        self._known, self._routings = known, routings
        self._catalogue.replace(tasks)
        for route in state.tasks:
            for version in route.versions:
                if version.state is State.PUSHED and await self._verify(route.task, version):
                    return not self._troubles
        return not self._troubles

    def _routing(self, route: TaskRoute, versions: Mapping[int, TaskVersion]) -> Routing:
        """The task's, if all that it names can be had here; else the one before, if that is so of it."""
        before = self._routings.get(route.task)
        if before is None or not before.named or route.routing.named <= versions.keys():
            return route.routing
        return before if before.named <= versions.keys() else route.routing

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
