"""What the registry says, as it is in force here: which version a request gets, and who may ask, how much;
and which adapters are in memory.

Catalogue and key ring are replaced whole at each change. A version's adapter is loaded when first wanted.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from random import random
from types import MappingProxyType
from typing import TYPE_CHECKING

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from adapter_registry.keys import StoredKey
from adapter_registry.names import PREVIOUS
from adapter_registry.routing import WHOLE, Routing, drawn
from prad.artefact import Artefact
from prefill_service.errors import (
    InternalError,
    InvalidKeyError,
    InvalidRequestError,
    NotReadyError,
    RateLimitedError,
    TaskNotAllowedError,
    UnknownModelError,
)
from prefill_service.prompt import TaskVersion

if TYPE_CHECKING:
    from prad.adapters import Adapter

logger = logging.getLogger(__name__)

AGAIN_S = 5.0
"""After which what cannot be had is tried again."""
_NOTHING: Mapping[int, str] = MappingProxyType({})
_UNHEARD = "the adapter registry has not answered yet"
_NAMED = 8  # tasks that an error message lists


@dataclass(frozen=True, slots=True)
class TaskVersions:
    """One task: the versions that answer, and what its names mean, of the registry's routing. `shadow`: under
    which requests also run, each with its percent; `missing`: what answers by the registry and cannot be had
    here, and why."""

    versions: Mapping[int, TaskVersion]
    split: Mapping[int, int]
    aliases: Mapping[str, int]
    shadow: Mapping[int, float]
    default: int | None
    revision: int
    missing: Mapping[int, str]

    @classmethod
    def of(
        cls, routing: Routing, versions: Mapping[int, TaskVersion], missing: Mapping[int, str] = _NOTHING
    ) -> "TaskVersions":
        previous = {} if routing.previous is None else {PREVIOUS: routing.previous}
        aliases = {**routing.aliases, **previous}
        names = (routing.split, aliases, routing.shadow, routing.default)
        return cls(versions, *names, routing.revision, missing)

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
        self.trouble: str | None = _UNHEARD
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
                f"{task}@{wanted} is not here {answering}: {found.missing[wanted]}",
                retry_after=AGAIN_S,
            )
        if name is None:
            raise UnknownModelError(f"task '{task}' has no current version {answering}")
        raise UnknownModelError(f"there is no {task}@{name} {answering}")

    def shadow(self, task: str, live: TaskVersion) -> TaskVersion | None:
        """The version under which a request for plain `task` that `live` answers also runs, drawn anew for
        each; None, as a rule: under none."""
        found = self._tasks[task]
        at = random() * WHOLE if found.shadow else 0.0
        for number, share in found.shadow.items():
            if at < share:
                return found.versions.get(number) if number != live.version else None
            at -= share
        return None

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

    `required`: everyone needs one, also while there is none; else from the first one on. `told`: whether it
    is known already that there is none; nobody is let in before.
    """

    def __init__(self, *, required: bool = False, told: bool = True) -> None:
        self._required = self._asked_for = required
        self._told = told
        self._clients: Mapping[str, Client] = {}
        self._windows = FixedWindowRateLimiter(MemoryStorage())

    def replace(self, keys: Sequence[StoredKey]) -> None:
        """New requests are let in by these; one that is revoked lets nobody in, and still says that keys are
        asked for."""
        known, self._told = self._clients, True
        self._clients = {
            key.sha256: known.get(key.sha256) or Client(key, self._windows)
            for key in keys
            if key.revoked_at is None
        }
        self._asked_for = self._required or bool(keys)

    def client(self, authorization: str | None) -> "Client | None":
        """Who shows a key in that header; None: nobody needs one. Raises InvalidKeyError, NotReadyError."""
        if not self._told:
            raise NotReadyError(f"not ready: {_UNHEARD}", retry_after=AGAIN_S)
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


@dataclass(slots=True)
class _Resident:
    """loaded: done once the adapter is in memory; nbytes: what it takes, its file's share until then."""

    loaded: "asyncio.Future[Adapter]"
    nbytes: int
    pins: int = 0


@dataclass(eq=False, slots=True)
class _Waiting:
    """turn: has the resident, pinned, once there is one."""

    artefact: Artefact
    turn: "asyncio.Future[_Resident]"


class Residents:
    """Adapters in memory: pinned while a prompt needs them, least recently used ones leave first.

    Bounded by `capacity` bytes; one that is larger is alone. Keyed by digest: versions with the same files
    share one adapter. Who finds no room waits in line, the oldest first. Nobody overtakes, or adapters in
    steady use would keep it from its room for ever; but those in line who want the same adapter go with it.
    `itemsize`: bytes of a matrix's number in memory.
    """

    def __init__(self, load: "Callable[[Artefact], Adapter]", capacity: int, itemsize: int) -> None:
        self._load = load
        self._capacity = capacity
        self._itemsize = itemsize
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._line: list[_Waiting] = []

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self._residents.values())

    def __len__(self) -> int:
        return len(self._residents)

    @asynccontextmanager
    async def pinned(self, artefact: Artefact) -> "AsyncIterator[Adapter]":
        """The artefact's adapter, kept in memory inside the `async with`; waits until there is room for it.

        Who holds one must not wait for another. Raises InternalError if the files do not load.
        """
        resident = await self._in_turn(artefact)
        try:
            yield await asyncio.shield(resident.loaded)
        finally:
            self._unpin(resident)

    async def _in_turn(self, artefact: Artefact) -> _Resident:
        waiting = _Waiting(artefact, asyncio.get_running_loop().create_future())
        self._line.append(waiting)
        self._call_up()
        try:
            return await asyncio.shield(waiting.turn)
        except asyncio.CancelledError:  # it leaves; its turn may have come in the same moment
            if waiting.turn.done():
                self._unpin(waiting.turn.result())
            else:
                self._line.remove(waiting)
                self._call_up()
            raise

    def _call_up(self) -> None:
        """Pins for the first in line as long as there is room, and for all who wait for the same."""
        while self._line and self._has_room(artefact := self._line[0].artefact):
            resident = self._residents.get(artefact.digest) or self._start_loading(artefact)
            self._residents.move_to_end(artefact.digest)
            line, self._line = self._line, []
            for waiting in line:
                if waiting.artefact.digest != artefact.digest:
                    self._line.append(waiting)
                else:
                    resident.pins += 1
                    waiting.turn.set_result(resident)

    def _unpin(self, resident: _Resident) -> None:
        resident.pins -= 1
        self._call_up()

    def _has_room(self, artefact: Artefact) -> bool:
        """Whether it is in memory, or fits beside what is in use."""
        if artefact.digest in self._residents:
            return True
        in_use = sum(resident.nbytes for resident in self._residents.values() if _in_use(resident))
        return not in_use or in_use + artefact.nbytes(self._itemsize) <= self._capacity

    def holds(self, artefact: Artefact) -> bool:
        """Whether it is in memory, or fits there beside all others."""
        there = artefact.digest in self._residents
        return there or (not self._line and self.nbytes + artefact.nbytes(self._itemsize) <= self._capacity)

    def _start_loading(self, artefact: Artefact) -> _Resident:
        nbytes = artefact.nbytes(self._itemsize)
        self._make_room(nbytes)
        loading = asyncio.create_task(self._load_one(artefact))
        resident = self._residents[artefact.digest] = _Resident(loading, nbytes)
        return resident

    async def _load_one(self, artefact: Artefact) -> "Adapter":
        try:
            adapter = await asyncio.to_thread(self._load, artefact)
        except Exception as error:
            logger.exception("the adapter %s does not load", artefact.digest)
            del self._residents[artefact.digest]
            self._call_up()
            raise InternalError(f"the adapter {artefact.digest[:12]} does not load: {error}") from error
        self._residents[artefact.digest].nbytes = adapter.nbytes  # a method may derive more
        self._make_room(0)
        asyncio.get_running_loop().call_soon(self._call_up)  # when this is done: who wanted it may have left
        return adapter

    def _make_room(self, nbytes: int) -> None:
        """As far as what is in use leaves any."""
        for digest, resident in list(self._residents.items()):
            if self.nbytes + nbytes <= self._capacity:
                return
            if not _in_use(resident):
                del self._residents[digest]


def _in_use(resident: _Resident) -> bool:
    return resident.pins > 0 or not resident.loaded.done()
