"""The stream of changes in Redis: each one that was made of late, under its revision, of which task or key it
was, and its mark. By it registries hear of each other's changes, and tell replicas what changed since theirs.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from redis import Redis
from redis.client import Pipeline

from adapter_registry import redis_server
from adapter_registry.keys import StoredKey, in_order, of_the_api
from adapter_registry.messages import HistoryLine, LoggedLine, RoutingState, TaskRoute
from adapter_registry.redis_schema import KEYS, TASKS, history_key
from adapter_registry.redis_server import REGISTRY
from adapter_registry.store import MOST_CHANGES, key_mark, line_mark

CHANGES = "{prad}:changes"
KEPT_CHANGES = 10_000
"""Roughly; who was away for longer reads the whole state, as everybody does who starts."""

_READINGS = 10
"""What changed is read once it is known of which tasks; again if another change came meanwhile."""

_MORE = 16
"""Lines that a list may get between the moment in which it is known which are wanted, and that of reading."""

Entries = list[tuple[str, dict[str, str]]]


def read_head(pipe: Pipeline) -> None:
    pipe.hmget(REGISTRY, "schema", "id", "revision")


def add_line(pipe: Pipeline, task: str, line: HistoryLine) -> None:
    change: dict[Any, Any] = {"task": task, "version": line.version or "", "event": line.event.value}
    change["mark"] = line_mark(task, line)
    pipe.xadd(CHANGES, change, id=f"{line.revision}-0", maxlen=KEPT_CHANGES, approximate=True)


def add_key(pipe: Pipeline, key: StoredKey) -> None:
    change: dict[Any, Any] = {"key": key.name, "mark": key_mark(key)}
    pipe.xadd(CHANGES, change, id=f"{key.revision}-0", maxlen=KEPT_CHANGES, approximate=True)


def mark(last: Entries, revision: int) -> str:
    """Of the change of that revision, if it is the `last` of the stream and a registry wrote it that marks
    its changes; else empty."""
    return last[-1][1].get("mark", "") if last and last[-1][0] == f"{revision}-0" else ""


def keys(found: Iterable[str]) -> tuple[StoredKey, ...]:
    return in_order(map(StoredKey.model_validate_json, found))


def changed(redis: Redis, identity: str, after: int, known: str) -> RoutingState | None:
    """See `Store.changed`; `known`: the mark."""
    if after < 0 or not known:
        return None
    for _ in range(_READINGS):
        with redis.pipeline() as pipe:
            read_head(pipe)
            pipe.xrange(CHANGES, f"{after}-0", count=MOST_CHANGES + 1)
            head, entries = pipe.execute()
        revision = redis_server.check(head, identity)
        if not _goes_on_from(entries, after, known, revision):
            return None
        since = [change for _, change in entries[1:]]
        tasks = sorted({change["task"] for change in since if "task" in change})
        same = all("task" in change for change in since)
        with redis.pipeline() as pipe:
            read_head(pipe)
            pipe.hmget(TASKS, tasks or [""])
            pipe.hvals(KEYS)
            head, found, all_keys = pipe.execute()
        if redis_server.check(head, identity) == revision:
            return RoutingState(
                revision=revision,
                tasks=tuple(TaskRoute.model_validate_json(text) for text in found if text is not None),
                keys=None if same else of_the_api(keys(all_keys)),
                mark=mark(entries, revision),
                since=after,
                same_keys=same,
            )
    return None  # changes come faster than they are read


def log(redis: Redis, identity: str, latest: int) -> tuple[LoggedLine, ...]:
    """See `Store.log`."""
    with redis.pipeline() as pipe:
        read_head(pipe)
        pipe.xrevrange(CHANGES, count=latest)
        head, entries = pipe.execute()
    redis_server.check(head, identity)
    return _lines(redis, entries)


def log_since(
    redis: Redis, identity: str, after: int, upto: int, most: int
) -> tuple[tuple[LoggedLine, ...], int]:
    """See `Store.log_since`."""
    with redis.pipeline() as pipe:
        read_head(pipe)
        pipe.xrange(CHANGES, f"{after + 1}-0", f"{upto}-0", count=most)
        head, entries = pipe.execute()
    redis_server.check(head, identity)
    return _lines(redis, entries), _revision(entries[-1]) if len(entries) == most else upto


def _lines(redis: Redis, entries: Entries) -> tuple[LoggedLine, ...]:
    """Of the tasks' changes among the entries, in order."""
    wanted: dict[tuple[str, int | None], list[int]] = {}
    for entry in entries:
        if task := entry[1].get("task"):  # not of a key
            version = entry[1]["version"]
            wanted.setdefault((task, int(version) if version else None), []).append(_revision(entry))
    with redis.pipeline() as pipe:
        for of, revisions in wanted.items():
            pipe.lrange(history_key(*of), -len(revisions) - _MORE, -1)
        lists = pipe.execute()
    found = []
    for (of, revisions), texts in zip(wanted.items(), lists, strict=True):
        lines = list(map(HistoryLine.model_validate_json, texts))
        if lines and lines[0].revision > min(revisions):
            lines = _from(redis, history_key(*of), min(revisions), len(revisions))
        found += [LoggedLine(**dict(line), task=of[0]) for line in lines if line.revision in revisions]
    return tuple(sorted(found, key=lambda line: line.revision))


def _from(redis: Redis, key: str, revision: int, count: int) -> list[HistoryLine]:
    """So many lines of a list from a revision on, which may be far from its end."""

    def at(place: int) -> int:
        return HistoryLine.model_validate_json(redis.lindex(key, place) or "").revision

    start = bisect_left(range(redis.llen(key)), revision, key=at)
    return list(map(HistoryLine.model_validate_json, redis.lrange(key, start, start + count - 1)))


def _revision(entry: tuple[str, dict[str, str]]) -> int:
    return int(entry[0].partition("-")[0])


def _goes_on_from(entries: Entries, after: int, known: str, revision: int) -> bool:
    """Whether these are all changes from that one, whose mark is `known`, to that of the revision."""
    if not entries or entries[0][1].get("mark") != known:
        return False
    return [place for place, _ in entries] == [f"{number}-0" for number in range(after, revision + 1)]
