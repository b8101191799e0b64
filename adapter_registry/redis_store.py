"""The store in Redis, which several registries may share.

    {prad}:registry         hash: schema, id, revision
    {prad}:tasks            hash: a task, its routing and its versions, as JSON
    {prad}:adapters         hash: a digest, its record, its files and who signed them, as JSON
    {prad}:keys             hash: a key's name, the key, as JSON
    {prad}:history:TASK@N   list: a version's history, as JSON
    {prad}:history:TASK     list: the task's changes of no version, likewise
    {prad}:changes          stream: every change of late, under its revision

Every change adds to the revision, and is one MULTI that Redis refuses if the revision is not the one it was
worked out from: then it is worked out anew.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel
from redis.client import Pipeline
from redis.exceptions import WatchError

from adapter_registry import redis_server, redis_stream
from adapter_registry.errors import StoreUnavailableError, VersionNotFoundError
from adapter_registry.keys import NewKey, StoredKey, issued, of_the_api, revoked
from adapter_registry.messages import HistoryLine, LoggedLine, RoutingState, TaskRoute, VersionRecord
from adapter_registry.planning import Move, Past, Wanted, numbered, plan
from adapter_registry.redis_records import (
    StoredFiles,
    StoredTask,
    added,
    loaded_task,
    moved,
    read,
    record,
    there,
    with_signatures,
)
from adapter_registry.redis_schema import ADAPTERS, KEYS, TASKS, history_key, migrate
from adapter_registry.redis_server import REGISTRY, answering
from adapter_registry.redis_stream import CHANGES, add_line, read_head
from adapter_registry.routing import Routing
from adapter_registry.snapshot import Snapshot, require_empty, snapshot
from adapter_registry.sqlite_rows import no_task
from adapter_registry.sqlite_store import utc_now
from adapter_registry.store import Idle, StoredAdapter
from adapter_registry.versions import Event, State

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

Work = Callable[[StoredTask | None, int, Past], tuple[StoredTask, list[HistoryLine], T]]
"""Of a task, the revision and its routings: what becomes of it, its lines of history, the answer."""

_READINGS = 10
"""Of a task's history: the first says which versions there are, the next is it unless one came meanwhile."""


class RedisStore:
    """Implements `store.Store`. `identity`: of the registry there; `replicas`: of Redis, that must have a
    change before it is acknowledged. Raises CannotStartError."""

    def __init__(self, url: str, *, replicas: int = 0, now: Callable[[], str] = utc_now) -> None:
        self._now = now
        self._replicas = replicas
        self._redis, self.address, self.identity = redis_server.start(url)
        with answering(self.address):
            migrate(self._redis)
        self._lock = threading.Lock()  # threads of this process need not race

    def push(self, task: str, adapter: StoredAdapter, *, by: str = "", source: str = "") -> tuple[int, bool]:
        def work(
            found: StoredTask | None, revision: int, past: Past
        ) -> tuple[StoredTask, list[HistoryLine], tuple[int, bool]]:
            known = found or StoredTask.new(task)
            same = [v for v in known.versions if v.digest == adapter.digest and not v.state.over]
            if same:
                number = same[-1].version
                changes = plan(known.view, Move(number, Event.PUSH), past)
                after = moved(known, changes, revision, at=self._now(), by=by, reason=source)
                return *after, (number, False)
            number = 1 + max((v.version for v in known.versions), default=0)
            return *added(known, number, adapter, revision + 1, self._now(), by, source), (number, True)

        return self._change(task, work, adapter)

    def change(
        self, task: str, wanted: Wanted, *, expected: int | None = None, by: str = "", reason: str = ""
    ) -> TaskRoute:
        def work(
            found: StoredTask | None, revision: int, past: Past
        ) -> tuple[StoredTask, list[HistoryLine], TaskRoute]:
            known = there(found, task)
            changes = plan(known.view, wanted, past, expected=expected)
            after, lines = moved(known, changes, revision, at=self._now(), by=by, reason=reason)
            return after, lines, TaskRoute.model_validate(after.model_dump())

        return self._change(task, work)

    def revision(self) -> int:
        with answering(self.address):
            return redis_server.revision(self._redis, self.identity)

    def state(self) -> RoutingState:
        revision, tasks, keys, mark = self._tasks(TaskRoute)
        return RoutingState(revision=revision, tasks=tuple(tasks), keys=of_the_api(keys), mark=mark)

    def changed(self, after: int, mark: str) -> RoutingState | None:
        with answering(self.address):
            return redis_stream.changed(self._redis, self.identity, after, mark)

    def task(self, task: str) -> TaskRoute:
        with answering(self.address):
            with self._redis.pipeline() as pipe:
                read_head(pipe)
                pipe.hget(TASKS, task)
                head, text = pipe.execute()
            redis_server.check(head, self.identity)
        if text is None:
            raise no_task(task)
        return TaskRoute.model_validate_json(text)

    def version(self, task: str, version: int) -> VersionRecord:
        with answering(self.address):
            with self._redis.pipeline() as pipe:
                read_head(pipe)
                pipe.hget(TASKS, task)
                pipe.lrange(history_key(task, version), 0, -1)
                head, text, lines = pipe.execute()
            redis_server.check(head, self.identity)
            found = there(read(text), task)
            route = next((v for v in found.versions if v.version == version), None)
            if route is None:
                others = numbered(v.version for v in found.versions)
                raise VersionNotFoundError(f"{task} has no version {version}{others}", param="version")
            adapter = self._redis.hget(ADAPTERS, route.digest)
        return record(found, route, StoredFiles.model_validate_json(adapter or ""), lines)

    def history(self, task: str, latest: int | None = None) -> tuple[HistoryLine, ...]:
        known: StoredTask | None = None
        for _ in range(_READINGS):
            with answering(self.address), self._redis.pipeline() as pipe:
                read_head(pipe)
                pipe.hget(TASKS, task)
                _ask_lines(pipe, known, latest)
                head, text, *lists = pipe.execute()
                redis_server.check(head, self.identity)
            seen, known = known, there(read(text), task)
            if seen is not None and len(seen.versions) == len(known.versions):
                lines = _in_order(lists)
                return lines if latest is None else lines[-latest:]
        raise StoreUnavailableError(f"{task!r} gets versions faster than its history is read; ask again")

    def log(self, latest: int) -> tuple[LoggedLine, ...]:
        with answering(self.address):
            return redis_stream.log(self._redis, self.identity, latest)

    def log_since(self, after: int, upto: int, most: int) -> tuple[tuple[LoggedLine, ...], int]:
        with answering(self.address):
            return redis_stream.log_since(self._redis, self.identity, after, upto, most)

    def add_key(self, new: NewKey, sha256: str, *, by: str = "") -> StoredKey:
        return self._change_key(
            new.name, lambda known, revision: issued(known, new, sha256, revision, self._now(), by)
        )

    def revoke_key(self, name: str, *, by: str = "") -> StoredKey:
        return self._change_key(name, lambda known, revision: revoked(known, name, revision, self._now(), by))

    def keys(self) -> tuple[StoredKey, ...]:
        with answering(self.address):
            with self._redis.pipeline() as pipe:
                read_head(pipe)
                pipe.hvals(KEYS)
                head, found = pipe.execute()
            redis_server.check(head, self.identity)
        return redis_stream.keys(found)

    def digests(self) -> frozenset[str]:
        _, tasks, _, _ = self._tasks(StoredTask)
        return frozenset(v.digest for task in tasks for v in task.versions if v.state is not State.DELETED)

    def idle(self) -> tuple[Idle, ...]:
        _, tasks, _, _ = self._tasks(StoredTask)
        versions = [(task.task, version) for task in tasks for version in task.versions]
        gone = (State.RETIRED, State.FAILED, State.DELETED)
        needed = {version.digest for _, version in versions if version.state not in gone}
        found = [
            (task, version)
            for task, version in sorted(versions, key=lambda each: each[1].changed)
            if version.state in (State.RETIRED, State.FAILED) and version.digest not in needed
        ]
        adapters = self._adapters({version.digest for _, version in found})
        return tuple(Idle(task, v.version, v.digest, adapters[v.digest].nbytes) for task, v in found)

    def dump(self) -> Snapshot:
        while True:
            revision, tasks, keys, _ = self._tasks(StoredTask)
            versions = [(task, version) for task in tasks for version in task.versions]
            adapters = self._adapters({version.digest for _, version in versions})
            with answering(self.address), self._redis.pipeline() as pipe:
                read_head(pipe)
                for task, version in versions:
                    pipe.lrange(history_key(task.task, version.version), 0, -1)
                for task in tasks:
                    pipe.lrange(history_key(task.task, None), 0, -1)
                head, *histories = pipe.execute()
            if redis_server.check(head, self.identity) == revision:
                break
        records: dict[str, list[VersionRecord]] = {}
        for (task, version), lines in zip(versions, histories, strict=False):
            records.setdefault(task.task, []).append(record(task, version, adapters[version.digest], lines))
        others = (map(HistoryLine.model_validate_json, lines) for lines in histories[len(versions) :])
        return snapshot(
            revision,
            ((task, records[task.task], lines) for task, lines in zip(tasks, others, strict=True)),
            keys,
        )

    def load(self, loaded: Snapshot) -> None:
        with self._lock, answering(self.address):
            while not self._loads(loaded):
                pass  # another registry was faster, and may have left it empty
            self._replicated()

    def _loads(self, loaded: Snapshot) -> bool:
        """Whether nobody changed anything meanwhile: else nothing is written."""
        with self._redis.pipeline() as pipe:
            redis_server.watch(pipe)
            redis_server.revision(pipe, self.identity)
            require_empty(pipe.hlen(TASKS), pipe.hlen(KEYS))
            pipe.multi()
            for each in loaded.versions:
                pipe.hset(ADAPTERS, each.digest, StoredFiles(**dict(each)).model_dump_json())
            for name, line in loaded.lines:
                _write_line(pipe, name, line)
            for task in loaded.tasks:
                pipe.hset(TASKS, task.task, loaded_task(task).model_dump_json())
            for key in loaded.keys:
                pipe.hset(KEYS, key.name, key.model_dump_json())
            if loaded.revision > max((line.revision for _, line in loaded.lines), default=0):
                # the last change was of a key, of which no line tells: registries that run here hear of it
                pipe.xadd(CHANGES, {"key": ""}, id=f"{loaded.revision}-0")
            pipe.hset(REGISTRY, "revision", loaded.revision)
            try:
                pipe.execute()
            except WatchError as error:
                redis_server.require_overtaken(error)
                return False
            return True

    def warnings(self) -> tuple[str, ...]:
        with answering(self.address):
            return redis_server.warnings(self._redis, self.address, self._replicas)

    def close(self) -> None:
        self._redis.close()

    def _change(self, task: str, work: "Work[T]", adapter: StoredAdapter | None = None) -> T:
        """What `work` makes of the task as it is, written at once, or not at all and worked out again."""
        with self._lock, answering(self.address):
            while True:
                with self._redis.pipeline() as pipe:
                    redis_server.watch(pipe)
                    revision = redis_server.revision(pipe, self.identity)
                    found = read(pipe.hget(TASKS, task))

                    after, lines, answer = work(found, revision, self._past(found))
                    files = {} if adapter is None else _news(pipe, adapter)
                    if not lines and not files:
                        break
                    pipe.multi()
                    if files:
                        pipe.hset(ADAPTERS, mapping=files)
                    pipe.hset(TASKS, task, after.model_dump_json())
                    for line in lines:
                        _write_line(pipe, task, line)
                    pipe.hset(REGISTRY, "revision", revision + len(lines))
                    try:
                        pipe.execute()
                    except WatchError as error:
                        redis_server.require_overtaken(error)
                        continue
                    break
            self._replicated()  # also what was so already: whoever made it may have had no answer
            return answer

    def _change_key(self, name: str, work: Callable[[StoredKey | None, int], StoredKey]) -> StoredKey:
        """What `work` makes of the key and the next revision: as `_change`."""
        with self._lock, answering(self.address):
            while True:
                with self._redis.pipeline() as pipe:
                    redis_server.watch(pipe)
                    revision = redis_server.revision(pipe, self.identity) + 1
                    text = pipe.hget(KEYS, name)
                    known = None if text is None else StoredKey.model_validate_json(text)
                    if (after := work(known, revision)) is known:
                        break
                    pipe.multi()
                    pipe.hset(KEYS, name, after.model_dump_json())
                    redis_stream.add_key(pipe, after)
                    pipe.hset(REGISTRY, "revision", revision)
                    try:
                        pipe.execute()
                    except WatchError as error:
                        redis_server.require_overtaken(error)
                        continue
                    break
            self._replicated()
            return after

    def _replicated(self) -> None:
        redis_server.replicated(self._redis, self.address, self._replicas)

    def _past(self, task: StoredTask | None) -> Past:
        """Its routings, which are read once, and only if one is asked for."""

        @cache
        def routings() -> Mapping[int, Routing | None]:
            with self._redis.pipeline() as pipe:
                _ask_lines(pipe, task, None)
                return {line.revision: line.routing for line in _in_order(pipe.execute())}

        return lambda revision: routings().get(revision)

    def _tasks(self, kind: type[M]) -> tuple[int, list[M], tuple[StoredKey, ...], str]:
        """All tasks by name, and all keys, at one revision; and the mark of its change."""
        with answering(self.address):
            with self._redis.pipeline() as pipe:
                read_head(pipe)
                pipe.hgetall(TASKS)
                pipe.hvals(KEYS)
                pipe.xrevrange(CHANGES, count=1)
                head, found, keys, last = pipe.execute()
            revision = redis_server.check(head, self.identity)
        tasks = [kind.model_validate_json(found[name]) for name in sorted(found)]
        return revision, tasks, redis_stream.keys(keys), redis_stream.mark(last, revision)

    def _adapters(self, digests: Iterable[str]) -> Mapping[str, StoredFiles]:
        names = sorted(digests)
        if not names:
            return {}
        with answering(self.address):
            found = self._redis.hmget(ADAPTERS, names)
        return {
            name: StoredFiles.model_validate_json(text or "") for name, text in zip(names, found, strict=True)
        }


def _news(pipe: Pipeline, adapter: StoredAdapter) -> dict[Any, Any]:
    """What is to be written of an adapter: nothing if all of it is known, who signed it included."""
    known = pipe.hget(ADAPTERS, adapter.digest)
    text = with_signatures(adapter, known).model_dump_json()
    return {} if text == known else {adapter.digest: text}


def _ask_lines(pipe: Pipeline, task: StoredTask | None, latest: int | None) -> None:
    """Lists of what happened to the task and to each of its versions; `latest`: the last of each only."""
    if task is not None:
        for number in (None, *(version.version for version in task.versions)):
            pipe.lrange(history_key(task.task, number), 0 if latest is None else -latest, -1)


def _in_order(lists: Iterable[list[str]]) -> tuple[HistoryLine, ...]:
    found = [HistoryLine.model_validate_json(text) for texts in lists for text in texts]
    return tuple(sorted(found, key=lambda line: line.revision))


def _write_line(pipe: Pipeline, task: str, line: HistoryLine) -> None:
    pipe.rpush(history_key(task, line.version), line.model_dump_json())
    add_line(pipe, task, line)
