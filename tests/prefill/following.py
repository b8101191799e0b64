"""A follower of a registry of plain data: states told one after the other."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

from adapter_registry.client_calls import Progress
from adapter_registry.errors import IllegalTransitionError, StoredFilesDamagedError
from adapter_registry.messages import RoutingState, TaskRoute, VersionRoute
from adapter_registry.routing import Routing
from adapter_registry.versions import State
from prad.artefact import BaseModelRef
from prefill_service.catalogue import KeyRing, TaskCatalogue
from prefill_service.follower import RegistryFollower
from tests.prefill.fakes import version


def digest(number: int) -> str:
    return f"{number:064x}"


def state(revision: int, current: int | None, **versions: State) -> RoutingState:
    """One task, t, of versions `v1`, `v2`, ... of the same base model."""
    return routed(revision, {} if current is None else {current: 100}, versions)


def routed(
    revision: int,
    split: Mapping[int, int],
    versions: Mapping[str, State],
    bases: Mapping[str, str] = MappingProxyType({}),
    aliases: Mapping[str, int] = MappingProxyType({}),
) -> RoutingState:
    """The same, divided between some of them; `bases`: digests of their base models' weights."""
    routes = [
        VersionRoute(
            version=int(name[1:]),
            digest=digest(int(name[1:])),
            state=state,
            method="pa",
            base=BaseModelRef(name="tiny", architecture="llama", weights=bases.get(name, "tiny")),
            pushed_at="",
        )
        for name, state in versions.items()
    ]
    routing = Routing(revision=revision, split=split, aliases=aliases)
    return RoutingState(
        revision=revision, tasks=(TaskRoute(task="t", routing=routing, versions=tuple(routes)),)
    )


class Registry:
    """A registry that tells its states one after the other, and then nothing more."""

    def __init__(self, *states: RoutingState | Exception) -> None:
        self.states = list(states)
        self.fetched: list[int] = []
        self.probes: list[tuple[int, bool, str]] = []
        self.damaged: set[int] = set()
        self.moot = False
        self.in_force: list[int] = []
        self.tidied = 0
        self.told = asyncio.Event()

    async def state(self) -> RoutingState:
        return await self._next()

    async def changes(self, after: int, wait: float, *, mark: str, progress: Progress) -> RoutingState | None:
        self.in_force.append(progress.in_force)
        self.troubles = list(progress.troubles)
        return await self._next()

    async def tidy(self) -> None:
        self.tidied += 1

    async def _next(self) -> RoutingState:
        if not self.states:
            self.told.set()
            await asyncio.Event().wait()
        told = self.states.pop(0)
        if isinstance(told, Exception):
            raise told
        return told

    async def fetch(self, task: str, number: int, of: str) -> Any:
        self.fetched.append(number)
        if number in self.damaged:
            raise StoredFilesDamagedError("damaged")
        return version(of).artefact

    async def probe(self, task: str, number: int, *, ok: bool, reason: str = "") -> None:
        self.probes.append((number, ok, reason))
        if self.moot:
            raise IllegalTransitionError("retired meanwhile")


async def sound(artefact: Any) -> None:
    return


async def followed(
    registry: Registry,
    probe: Callable[[Any], Awaitable[None]] = sound,
    base: str = "plain",
    load: Callable[[Any], Awaitable[None]] = sound,
    keys: KeyRing | None = None,
    weights: str | None = None,
) -> tuple[TaskCatalogue, RegistryFollower]:
    catalogue = TaskCatalogue(base)
    client: Any = registry
    follower = RegistryFollower(client, catalogue, keys or KeyRing(), probe, load, weights)
    assert catalogue.trouble is not None
    task = asyncio.create_task(follower.run())
    await registry.told.wait()
    while follower._verifier.busy:  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return catalogue, follower
