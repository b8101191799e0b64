"""What the registry says, as it is in force here: which version a request gets, and who may ask, how much.

A version whose adapter is not on this machine's disk yet is fetched before others when a request names it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from random import random
from types import MappingProxyType
from typing import Protocol

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from adapter_registry.keys import StoredKey
from adapter_registry.names import PREVIOUS
from adapter_registry.routing import WHOLE, Routing, drawn
from prefill_service.errors import (
    InvalidKeyError,
    InvalidRequestError,
    NotHereYetError,
    NotReadyError,
    RateLimitedError,
    TaskNotAllowedError,
    UnknownModelError,
)
from prefill_service.prompt import TaskVersion

AGAIN_S = 5.0
"""After which what cannot be had is tried again."""
_UNHEARD = "the adapter registry has not answered yet"
_NAMED = 8  # tasks that an error message lists


class Coming(Protocol):
    """A version whose adapter is on its way here."""

    @property
    def number(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def method(self) -> str: ...

    async def here(self) -> None:
        """Has it fetched before others; returns when it is here. Raises NotReadyError, OverloadedError."""
        ...


_NOTHING: Mapping[int, str] = MappingProxyType({})
_NONE: Mapping[int, Coming] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TaskVersions:
    """One task: the versions that answer, and what its names mean, of the registry's routing. `shadow`: under
    which requests also run, each with its percent; `missing`: what answers by the registry and cannot be had
    here, and why; `coming`: what is on its way here."""

    versions: Mapping[int, TaskVersion]
    split: Mapping[int, int]
    aliases: Mapping[str, int]
    shadow: Mapping[int, float]
    default: int | None
    revision: int
    missing: Mapping[int, str]
    coming: Mapping[int, Coming]

    @classmethod
    def of(
        cls,
        routing: Routing,
        versions: Mapping[int, TaskVersion],
        missing: Mapping[int, str] = _NOTHING,
        coming: Mapping[int, Coming] = _NONE,
    ) -> "TaskVersions":
        previous = {} if routing.previous is None else {PREVIOUS: routing.previous}
        aliases = {**routing.aliases, **previous}
        names = (routing.split, aliases, routing.shadow, routing.default)
        return cls(versions, *names, routing.revision, missing, coming)

    @property
    def answers(self) -> Sequence[int]:
        """The versions that requests may name, those on their way included."""
        return sorted({*self.versions, *self.coming})

    @property
    def aliases_here(self) -> Mapping[str, int]:
        answers = self.answers
        return {name: meant for name, meant in self.aliases.items() if meant in answers}

    def answering(self, task: str) -> str:
        """The names, beside the task's own, by which it answers here: a few, in words."""
        names = [*map(str, self.answers), *sorted(self.aliases_here)]
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
    default: TaskVersion | Coming
    routed: TaskVersions


class TaskCatalogue:
    """What new requests are resolved against; none of its methods waits for anything. `base_name`: the id
    under which clients name the plain model. `trouble`: why it is not to be relied on yet; None if it is.
    `told` hears of each change of a task."""

    def __init__(
        self, base_name: str, told: "Callable[[str, TaskVersions | None], None] | None" = None
    ) -> None:
        self.base_name = base_name
        self._told = told
        self.trouble: str | None = _UNHEARD
        self._tasks: dict[str, TaskVersions] = {}

    @property
    def fetching(self) -> int:
        """Versions whose adapters are on their way."""
        return sum(len(task.coming) for task in self._tasks.values())

    def replace(self, tasks: Mapping[str, TaskVersions]) -> None:
        """From now on new requests see `tasks`; running ones keep what they resolved."""
        self._tasks = dict(tasks)

    def update(self, task: str, routed: TaskVersions | None) -> None:
        """Likewise, of one task; None: there is none of the name any more."""
        if routed is None:
            self._tasks.pop(task, None)
        else:
            self._tasks[task] = routed
        if self._told is not None:
            self._told(task, routed)

    def resolve(
        self, task: str, name: int | str | None, key: str | None = None, asks: "Client | None" = None
    ) -> tuple[TaskVersion, int]:
        """The version that a new request gets, and the revision of the routing that says so.

        `name`: a version's number, or an alias; None: what plain `task` means, for the sticky `key`, or for
        nobody in particular. Raises UnknownModelError whose message lists a few known tasks that who `asks`
        may use; NotReadyError while the version cannot be had here, NotHereYetError while it is on its way.
        """
        found = self._tasks.get(task)
        if found is None:
            names = (n for n, t in self._tasks.items() if t.answers and (asks is None or asks.may_use(n)))
            known = ", ".join(sorted(names)[:_NAMED]) or "none yet"
            raise UnknownModelError(
                f"there is no task or model '{task}' (tasks: {known}; the plain model: {self.base_name})"
            )
        wanted = found.meant(name, task, key)
        if wanted is not None and wanted in found.versions:
            return found.versions[wanted], found.revision
        if wanted is not None and (coming := found.coming.get(wanted)) is not None:
            raise NotHereYetError(f"{task}@{wanted} is on its way here", coming.here)
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
        found = []
        for name, task in sorted(self._tasks.items()):
            if task.default is not None:
                default = task.versions.get(task.default) or task.coming.get(task.default)
                found += [] if default is None else [TaskEntry(name, default, task)]
        return found


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

    def client(self, authorization: str | None, key: str | None = None) -> "Client | None":
        """Who shows a key in that header; None: nobody needs one. `key`: of x-api-key, where Anthropic's
        clients have theirs. Raises InvalidKeyError, NotReadyError."""
        if not self._told:
            raise NotReadyError(f"not ready: {_UNHEARD}", retry_after=AGAIN_S)
        if not self._asked_for:
            return None
        if authorization is None and key is not None:
            authorization = f"Bearer {key}"
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer":
            raise InvalidKeyError(f"this server asks for an API key: {_HOW_TO_AUTHORIZE}")
        found = self._clients.get(sha256(token.strip().encode()).hexdigest())
        if found is None:
            raise InvalidKeyError(f"this API key is not known, or was revoked: {_HOW_TO_AUTHORIZE}")
        return found

    def named(self, name: str | None) -> "Client | None":
        """Who was let in before, by the key's name; None: nobody needed one, and nobody needs one now. Raises
        InvalidKeyError if it is not in force any more, NotReadyError."""
        if name is None or not self._told:
            return self.client(None)
        found = next((client for client in self._clients.values() if client.name == name), None)
        if found is None:
            raise InvalidKeyError(f"the API key {name!r} is not in force any more")
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
