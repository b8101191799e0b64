"""A follower of a registry that lives: what it tells, and when its files come, is a test's to say."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from adapter_registry.client_calls import Progress
from adapter_registry.errors import RegistryUnreachableError
from adapter_registry.messages import RoutingState
from adapter_registry.versions import State
from prefill_service.catalogue import KeyRing, TaskCatalogue
from prefill_service.errors import NotHereYetError
from prefill_service.follower import Load, RegistryFollower
from prefill_service.prompt import TaskVersion
from prefill_service.verifying import Probe
from tests.prefill.fakes import version
from tests.prefill.following import digest, sound, state


def tasks(revision: int, *names: str, current: int | None = 1, **more: Any) -> RoutingState:
    """Each with one version, which is routed, of its own files."""
    routes = []
    for number, name in enumerate(names):
        (route,) = state(revision, current, **(more or {"v1": State.ROUTABLE})).tasks
        own = tuple(v.model_copy(update={"digest": digest(100 * number + v.version)}) for v in route.versions)
        routes.append(route.model_copy(update={"task": name, "versions": own}))
    return RoutingState(revision=revision, tasks=tuple(routes), mark=f"mark {revision}")


class LiveRegistry:
    """Tells what `tell` is given; files come when `let` says so, or are what is wrong with them."""

    def __init__(self, first: RoutingState) -> None:
        self._first = first
        self._told: asyncio.Queue[RoutingState] = asyncio.Queue()
        self._gates: dict[str, asyncio.Event] = {}
        self.wrong: dict[str, Exception] = {}
        self.fetched: list[str] = []
        self.running = self.most = 0
        self.asked: list[tuple[int, str]] = []
        self.progress = Progress(-1)
        self.wholes = 0
        self.away = False
        self.probes: list[tuple[str, bool, str]] = []

    async def state(self) -> RoutingState:
        self.wholes += 1
        return self._first

    async def changes(self, after: int, wait: float, *, mark: str, progress: Progress) -> RoutingState | None:
        self.asked.append((after, mark))
        self.progress = progress
        try:
            async with asyncio.timeout(wait):
                return await self._told.get()
        except TimeoutError:
            if self.away:
                raise RegistryUnreachableError("no registry") from None
            return None

    def tell(self, told: RoutingState) -> None:
        self._first = told
        self._told.put_nowait(told)

    def let(self, *names: str) -> None:
        for name in names:
            self._gate(name).set()

    async def fetch(self, task: str, number: int, of: str) -> Any:
        name = f"{task}@{number}"
        self.fetched.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._gate(name).wait()
        finally:
            self.running -= 1
        if name in self.wrong:
            raise self.wrong[name]
        return version(of).artefact

    async def probe(self, task: str, number: int, *, ok: bool, reason: str = "") -> None:
        self.probes.append((f"{task}@{number}", ok, reason))

    async def tidy(self) -> None: ...

    def _gate(self, name: str) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())


@asynccontextmanager
async def following(
    registry: LiveRegistry, probe: Probe = sound, load: Load = sound, **more: Any
) -> AsyncIterator[TaskCatalogue]:
    catalogue, client = TaskCatalogue("plain"), registry
    follower = RegistryFollower(client, catalogue, KeyRing(), probe, load, **more)  # type: ignore[arg-type]
    running = asyncio.create_task(follower.run())
    await until(lambda: catalogue.trouble is None)
    yield catalogue
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def until(so: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def wanted(catalogue: TaskCatalogue, task: str) -> TaskVersion:
    """As a request waits for it."""
    while True:
        try:
            return catalogue.resolve(task, None)[0]
        except NotHereYetError as error:
            await error.here()
