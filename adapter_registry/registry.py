"""The registry itself, behind HTTP: files are kept, the store decides, waiters are woken. In that order."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from adapter_registry.api import Probe, Pushed, RoutingState, TaskRoute, VersionRecord
from adapter_registry.artefacts import ArtefactFolder
from adapter_registry.changes import ChangeFeed
from adapter_registry.errors import FileNotStoredError
from adapter_registry.metrics import Metrics
from adapter_registry.names import check_task
from adapter_registry.replicas import Replicas
from adapter_registry.store import Store
from adapter_registry.versions import Event

T = TypeVar("T")


class Registry:
    """Blocking work (disk, database) runs in worker threads; the feed stays on the event loop."""

    def __init__(
        self, store: Store, files: ArtefactFolder, feed: ChangeFeed, replicas: Replicas, metrics: Metrics
    ) -> None:
        self._store = store
        self.files = files
        self.feed = feed
        self.replicas = replicas
        self.metrics = metrics

    async def push(self, task: str, staged: Path) -> Pushed:
        """Makes a version of the files in `staged`. Raises InvalidTaskNameError, AdapterRefusedError."""
        check_task(task)

        def store() -> Pushed:
            adapter = self.files.keep(staged)
            number, created = self._store.push(task, adapter)
            record = self._store.version(task, number)
            return Pushed(**dict(record), created=created)

        pushed = await self._change(store)
        self.metrics.pushed(created=pushed.created)
        return pushed

    async def probe(self, task: str, version: int, probe: Probe) -> VersionRecord:
        """A replica's report. Raises NotFoundError, IllegalTransitionError."""
        self.replicas.heard(probe.replica)
        event = Event.PROBE_OK if probe.ok else Event.PROBE_FAILED
        return await self._apply(task, version, event, replica=probe.replica, reason=probe.reason)

    async def promote(self, task: str, version: int) -> VersionRecord:
        """Makes the version what plain `task` means. Raises NotFoundError, IllegalTransitionError."""
        return await self._apply(task, version, Event.PROMOTE)

    async def retire(self, task: str, version: int, *, force: bool) -> VersionRecord:
        """Ends the version for new requests. Raises NotFoundError, CurrentVersionInUseError."""
        return await self._apply(task, version, Event.RETIRE, force=force)

    async def state(self) -> RoutingState:
        return await asyncio.to_thread(self._store.state)

    async def task(self, task: str) -> TaskRoute:
        """Raises TaskNotFoundError."""
        return await asyncio.to_thread(self._store.task, task)

    async def version(self, task: str, version: int) -> VersionRecord:
        """Raises TaskNotFoundError, VersionNotFoundError."""
        return await asyncio.to_thread(self._store.version, task, version)

    async def changes(self, after: int, seconds: float, replica: str) -> RoutingState | None:
        """The state as soon as its revision is not `after`; None if it still is.

        Raises TooManyWaitersError.
        """
        with self.replicas.following(replica):
            changed = await self.feed.wait(after, seconds)
        return await self.state() if changed else None

    async def file(self, task: str, version: int, name: str) -> Path:
        """Raises NotFoundError, StoredFilesDamagedError."""
        record = await self.version(task, version)
        names = [file.name for file in record.files]
        if name not in names:
            raise FileNotStoredError(
                f"{record.name} has no file {name!r}; its files: {', '.join(names)}", param="name"
            )
        return await asyncio.to_thread(self.files.file, record.digest, name)

    async def _apply(
        self,
        task: str,
        version: int,
        event: Event,
        *,
        force: bool = False,
        replica: str = "",
        reason: str = "",
    ) -> VersionRecord:
        def apply() -> VersionRecord:
            self._store.apply(task, version, event, force=force, replica=replica, reason=reason)
            return self._store.version(task, version)

        record = await self._change(apply)
        self.metrics.event(event)
        return record

    async def _change(self, work: Callable[[], T]) -> T:
        result = await asyncio.to_thread(work)
        await self.feed.publish(await asyncio.to_thread(self._store.revision))
        return result
