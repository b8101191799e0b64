"""The registry itself, behind HTTP: files are kept, the store decides, waiters are woken. In that order."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from adapter_registry.changes import ChangeFeed
from adapter_registry.client_calls import UNTOLD
from adapter_registry.errors import (
    AdapterRefusedError,
    FileNotStoredError,
    StoreUnavailableError,
    TooManyWaitersError,
)
from adapter_registry.file_store import FileStore
from adapter_registry.keys import ChangedKey, NewKey, StoredKey, hashed, new_token
from adapter_registry.messages import (
    LoggedLine,
    Probe,
    Pushed,
    ReplicaList,
    Rerouted,
    RoutingState,
    TaskHistory,
    TaskRoute,
    VersionRecord,
    Warmed,
)
from adapter_registry.metrics import Metrics
from adapter_registry.names import check_task
from adapter_registry.planning import Move, Wanted
from adapter_registry.quotas import require_quota, require_quota_again
from adapter_registry.replicas import Replicas
from adapter_registry.retention import make_room
from adapter_registry.settings import Bounds
from adapter_registry.sharing import Shared
from adapter_registry.signers import Signers
from adapter_registry.staging import check
from adapter_registry.storage import storing
from adapter_registry.store import Store, StoredAdapter
from adapter_registry.versions import Event, State

T = TypeVar("T")

logger = logging.getLogger(__name__)

FILE_WORKERS = 16
"""Threads of work with files that come or go, and as many of those that are asked for. They may wait for a
bucket, so nothing else waits behind them."""

TIDY_S = 3600.0
"""Between two looks for files that no version needs."""

CHECK_SECONDS = 60.0
"""An upload that takes longer to check is refused: what is sent may be anything."""


@dataclass(frozen=True, slots=True)
class Follower:
    """Who asks for changes: a replica's name (empty: an operator), its address, what is in force there, what
    it cannot have, and how many adapters are on their way to it."""

    replica: str
    address: str
    in_force: int
    troubles: tuple[str, ...] = ()
    fetching: int = 0


class Registry:
    """Blocking work (disk, database) runs in worker threads; the feed stays on the event loop."""

    def __init__(
        self,
        store: Store,
        files: FileStore,
        feed: ChangeFeed,
        replicas: Replicas,
        metrics: Metrics,
        bounds: Bounds,
        signers: Signers,
    ) -> None:
        self._store = store
        self._signers = signers
        self._bounds = bounds
        self._file_workers = ThreadPoolExecutor(FILE_WORKERS, "files")
        self._fetches = Shared(ThreadPoolExecutor(FILE_WORKERS, "fetches"))
        self._room = Shared(ThreadPoolExecutor(1, "room"))
        self.files = files
        self.feed = feed
        self.replicas = replicas
        self.metrics = metrics

    async def ready(self) -> tuple[int, tuple[str, ...]]:
        """The revision, and what an operator should mend.

        Raises StorageFullError if there is hardly any disk left, StoreUnavailableError.
        """
        await self.require_room()
        return await asyncio.to_thread(lambda: (self._store.revision(), self._store.warnings()))

    async def metrics_page(self) -> bytes:
        """What Prometheus scrapes, also while the store does not answer."""
        try:
            state, warnings = await asyncio.to_thread(lambda: (self._store.state(), self._store.warnings()))
        except StoreUnavailableError:
            self.metrics.stored(None, 0)
        else:
            self.metrics.stored(state, len(warnings))
        connected = sum(replica.connected for replica in self.replicas.list(self.feed.revision))
        return self.metrics.page(self.feed.waiters, connected)

    async def require_room(self) -> None:
        """Raises StorageFullError if a push would find hardly any disk left, StoreUnavailableError if its
        files could not be kept."""
        await self._room.do("room", lambda: self.files.require_room(self._bounds.free_bytes))

    async def admit(self, staged: Path) -> StoredAdapter:
        """What there is to store, once nothing is wrong with the files in `staged`.

        Raises AdapterRefusedError, SignatureRefusedError, SigningKeysError.
        """
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                return await asyncio.to_thread(self._admit, staged)
        except TimeoutError:
            raise AdapterRefusedError(
                f"the adapter was not read and checked in {CHECK_SECONDS:.0f} s", param="files"
            ) from None

    async def push(
        self, task: str, staged: Path, adapter: StoredAdapter, *, by: str, source: str = ""
    ) -> Pushed:
        """Makes a version of admitted files. `by`: who asks; `source`: where they were fetched, if they were.

        Raises InvalidTaskNameError, QuotaExceededError, StorageFullError, StoreUnavailableError.
        """
        check_task(task)

        def store() -> Pushed:
            self._store.revision()  # while it is away nothing is sent that could not be entered
            require_quota(self._store, self._bounds, task, adapter)
            with self.files.kept([(staged, adapter.digest)]) as keeping:
                number, created = self._store.push(task, adapter, by=by, source=source)
                keeping.known = not created
            return Pushed(**dict(self._store.version(task, number)), created=created)

        pushed = await self._with_files(lambda: _stored(store))
        await self._publish()
        self.metrics.pushed(created=pushed.created)  # nothing became idle by it: no room is to be made
        return pushed

    async def settled(self, pushed: Pushed, seconds: float) -> Pushed:
        """The version as it is once it was probed, and all connected replicas know of that; or after
        `seconds`."""
        loop = asyncio.get_running_loop()
        latest = loop.time() + seconds
        record: VersionRecord = pushed
        with suppress(TooManyWaitersError):  # it is stored: whoever pushed can look for itself
            changed = True
            while changed and record.state is State.PUSHED:
                revision = self.feed.revision
                record = await self.version(pushed.task, pushed.version)
                if record.state is State.PUSHED:
                    left = latest - loop.time()
                    changed = await self.feed.wait(revision, left, address="who pushed", known=True)
        revision = record.history[-1].revision
        await self.replicas.wait(revision, latest - loop.time())
        pending = tuple(self.replicas.pending(revision))
        return Pushed(**dict(record) | {"created": pushed.created, "pending": pending})

    def _admit(self, staged: Path) -> StoredAdapter:
        adapter = check(staged, pushed=True)
        return replace(adapter, signatures=self._signers.take(staged, adapter.digest))

    async def probe(self, task: str, version: int, probe: Probe) -> VersionRecord:
        """A replica's report. Raises NotFoundError, IllegalTransitionError."""
        self.replicas.heard(probe.replica)
        event = Event.PROBE_OK if probe.ok else Event.PROBE_FAILED
        await self._apply(task, Move(version, event), by=probe.replica, reason=probe.reason)
        if not probe.ok:
            await self._make_room()
        return await self.version(task, version)

    async def reroute(self, task: str, wanted: Wanted, *, expected: int | None, by: str) -> Rerouted:
        """Changes the task's routing, at all replicas that put that in force in time.

        `expected`: the revision of the task's routing, if whoever asks insists on one.
        Raises RoutingChangedError if it is another, and what else `planning.plan` raises, NotFoundError.
        """
        route = await self._apply(task, wanted, expected=expected, by=by)
        revision = self.feed.revision
        await self.replicas.wait(revision, self._bounds.wait_seconds)
        pending = tuple(self.replicas.pending(revision))
        replicas = self.replicas.in_force()
        if wanted.event is Event.RETIRE:  # nothing else makes files idle
            await self._make_room()
        return Rerouted(**dict(route), replicas=replicas, pending=pending)

    async def warm(self, task: str, version: int, *, by: str) -> Warmed:
        """Has all connected replicas load the version into memory, and says how far they are with it.

        Raises NotFoundError, IllegalTransitionError if it does not answer.
        """
        await self._apply(task, Move(version, Event.WARM), by=by)
        revision = self.feed.revision
        await self.replicas.wait(revision, self._bounds.wait_seconds)
        pending = frozenset(self.replicas.pending(revision))
        failed = self.replicas.troubled(UNTOLD) | self.replicas.troubled(f"{task}@{version}: ")
        following = frozenset(self.replicas.in_force())
        return Warmed(
            task=task,
            version=version,
            ready=tuple(sorted(following - pending - failed.keys())),
            failed=failed,
            pending=tuple(sorted(pending - failed.keys())),
        )

    async def unretire(self, task: str, version: int, *, by: str) -> VersionRecord:
        """Pushed again, as it were: to be probed. Raises NotFoundError, IllegalTransitionError,
        QuotaExceededError."""
        move = Move(version, Event.UNRETIRE)

        def unretire() -> TaskRoute:
            record = self._store.version(task, version)
            if record.state is State.RETIRED:  # from no other it comes back
                require_quota_again(self._store, self._bounds, record)
            return self._store.change(task, move, by=by)

        await self._change(unretire)
        self.metrics.event(move.event)
        return await self.version(task, version)

    async def delete(self, task: str, version: int, *, by: str) -> VersionRecord:
        """Removes the version's files. Raises NotFoundError, IllegalTransitionError while it answers,
        StoreUnavailableError, after which it may be deleted, or its record alone: once more is no mistake."""
        await self._apply(task, Move(version, Event.DELETE), by=by)
        record = await self.version(task, version)
        await self._with_files(lambda: self.files.remove(record.digest, self._store.digests))
        logger.info("deleted %s, digest %s, on request", record.name, record.digest)
        return record

    async def issue(self, new: NewKey, *, by: str) -> ChangedKey:
        """A new key, with its token; in force at all replicas that hear of it in time. Raises
        KeyExistsError."""
        token = new_token()
        key = await self._change(lambda: self._store.add_key(new, hashed(token), by=by))
        return await self._in_force(key, token)

    async def revoke(self, name: str, *, by: str) -> ChangedKey:
        """The key, revoked at all replicas that hear of it in time. Raises KeyNotFoundError."""
        return await self._in_force(await self._change(lambda: self._store.revoke_key(name, by=by)))

    async def keys(self) -> tuple[StoredKey, ...]:
        """All there ever were, in the order in which they were made."""
        return await asyncio.to_thread(self._store.keys)

    async def history(self, task: str, latest: int) -> TaskHistory:
        """Its `latest` changes. Raises TaskNotFoundError."""
        return TaskHistory(task=task, events=await asyncio.to_thread(self._store.history, task, latest))

    async def log(self, latest: int) -> tuple[LoggedLine, ...]:
        """The `latest` changes of all tasks, in order."""
        return await asyncio.to_thread(self._store.log, latest)

    async def log_since(self, after: int, upto: int, most: int) -> tuple[tuple[LoggedLine, ...], int]:
        """See `Store.log_since`."""
        return await asyncio.to_thread(self._store.log_since, after, upto, most)

    async def state(self) -> RoutingState:
        return await asyncio.to_thread(self._store.state)

    async def task(self, task: str) -> TaskRoute:
        """Raises TaskNotFoundError."""
        return await asyncio.to_thread(self._store.task, task)

    async def version(self, task: str, version: int) -> VersionRecord:
        """Raises TaskNotFoundError, VersionNotFoundError."""
        return await asyncio.to_thread(self._store.version, task, version)

    async def changes(
        self, after: int, seconds: float, follower: Follower, mark: str = ""
    ) -> RoutingState | None:
        """The state as soon as its revision is not `after`; None if it still is. With the `mark` of that
        revision only what changed since, where that can be told.

        Raises TooManyWaitersError.
        """
        known = self.replicas.knows(follower.replica)
        if known:  # its place is its own, whoever else waits at the address that it comes from
            follower = replace(follower, address=f"replica {follower.replica}")
        # Later than ours: of a registry whose data are gone.
        in_force = follower.in_force if follower.in_force <= self.feed.revision else 0
        told = (follower.replica, in_force, follower.troubles, follower.fetching)
        async with self.replicas.following(*told):
            changed = not await self._was(after, mark)
            changed = changed or await self.feed.wait(after, seconds, address=follower.address, known=known)
        if not changed:
            return None
        state = await asyncio.to_thread(lambda: self._store.changed(after, mark) or self._store.state())
        self.replicas.tell(follower.replica, state.revision)
        return state

    async def followers(self, revision: int, seconds: float) -> ReplicaList:
        """The replicas, once `revision` is in force at the connected ones, or `seconds` later."""
        await self.replicas.wait(revision, seconds, fetched=True)
        pending = self.replicas.pending(revision, fetched=True)
        return ReplicaList(replicas=self.replicas.list(self.feed.revision), pending=tuple(pending))

    async def _was(self, revision: int, mark: str) -> bool:
        """Whether the change of that revision, if it is the last one, has the mark: another one took its
        place where data were lost. True while the store is away, or no mark is known."""
        if not mark or revision != self.feed.revision:
            return True
        with suppress(StoreUnavailableError):
            return await asyncio.to_thread(self._store.changed, revision, mark) is not None
        return True

    async def file(self, task: str, version: int, name: str) -> Path:
        """Raises NotFoundError, StoredFilesDamagedError, StoreUnavailableError."""
        record = await self.version(task, version)
        if record.state is State.DELETED:
            raise FileNotStoredError(f"the files of {record.name} were deleted", param="version")
        names = [file.name for file in record.files]
        if name not in names:
            raise FileNotStoredError(
                f"{record.name} has no file {name!r}; its files: {', '.join(names)}", param="name"
            )
        return await self._fetches.do((record.digest, name), lambda: self.files.file(record.digest, name))

    async def _in_force(self, key: StoredKey, token: str | None = None) -> ChangedKey:
        await self.replicas.wait(key.revision, self._bounds.wait_seconds)
        pending = tuple(self.replicas.pending(key.revision))
        return ChangedKey(**dict(key), token=token, pending=pending)

    async def _apply(
        self, task: str, wanted: Wanted, *, expected: int | None = None, by: str = "", reason: str = ""
    ) -> TaskRoute:
        """The task afterwards."""

        def apply() -> TaskRoute:
            return self._store.change(task, wanted, expected=expected, by=by, reason=reason)

        route = await self._change(apply)
        self.metrics.event(wanted.event)
        return route

    async def tidy(self) -> None:
        """Now and then removes what refused pushes and removals left, and makes room; until cancelled."""
        while True:
            await asyncio.sleep(TIDY_S)
            try:
                await self._with_files(lambda: self.files.sweep(self._store.digests))
                await self._make_room()
            except StoreUnavailableError as error:
                logger.warning("what no version needs stays: %s", error)
            except Exception:  # whatever it was: it is tried again, and nobody else should suffer
                logger.exception("removing what no version needs failed")

    async def close(self) -> None:
        """Sends home whoever waits."""
        await self.feed.close()
        await self.replicas.close()

    async def _make_room(self) -> None:
        try:
            if await self._with_files(lambda: make_room(self._store, self.files, self._bounds.retired_bytes)):
                await self._publish()
        except StoreUnavailableError as error:  # what was asked for is done; room is made at the next change
            logger.warning("no room was made: %s", error)

    async def _change(self, work: Callable[[], T]) -> T:
        result = await asyncio.to_thread(_stored, work)
        await self._publish()
        return result

    async def _with_files(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._file_workers, work)

    async def _publish(self) -> None:
        with suppress(StoreUnavailableError):  # the change is made, and is heard of when the store is back
            await self.feed.publish(await asyncio.to_thread(self._store.revision))


def _stored(work: Callable[[], T]) -> T:
    with storing():
        return work()
