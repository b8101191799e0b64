"""Keys of the Redis store, and how an older program's become today's: in one MULTI, or not at all."""

import json
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import WatchError

from adapter_registry import redis_server
from adapter_registry.messages import HistoryLine
from adapter_registry.redis_records import StoredTask
from adapter_registry.redis_server import REGISTRY, SCHEMA
from adapter_registry.upgrading import upgraded

TASKS = "{prad}:tasks"
ADAPTERS = "{prad}:adapters"
KEYS = "{prad}:keys"


def history_key(task: str, version: int | None) -> str:
    return f"{{prad}}:history:{task}" if version is None else f"{{prad}}:history:{task}@{version}"


def migrate(client: Redis) -> None:
    """Makes the data of an older schema today's. Several registries may start at once: one of them does."""
    while not _migrated(client):
        pass


def _migrated(client: Redis) -> bool:
    with client.pipeline() as pipe:
        redis_server.watch(pipe)
        schema = _schema(pipe)
        if schema >= SCHEMA:
            return True
        # since the second one there is only more to be kept, of which older data have none
        found = pipe.hgetall(TASKS).values() if schema == 1 else ()
        tasks = [json.loads(text) for text in found]
        histories = [_history(client, task) for task in tasks]
        if _schema(pipe) != schema:  # what was read may be half of each
            return False
        pipe.multi()
        for task, history in zip(tasks, histories, strict=True):
            lines, routing = upgraded(history)
            stored = StoredTask.model_validate({**task, "routing": routing})
            pipe.hset(TASKS, stored.task, stored.model_dump_json())
            for version in stored.versions:
                pipe.delete(history_key(stored.task, version.version))
            for line in map(HistoryLine.model_validate, lines):
                pipe.rpush(history_key(stored.task, line.version), line.model_dump_json())
        pipe.hset(REGISTRY, "schema", SCHEMA)
        try:
            pipe.execute()
        except WatchError:
            return False
        return True


def _schema(reader: Pipeline) -> int:
    return int(reader.hget(REGISTRY, "schema") or SCHEMA)


def _history(client: Redis, task: dict[str, Any]) -> list[dict[str, Any]]:
    """As the first schema has it: a list for each version."""
    with client.pipeline() as pipe:
        numbers = [version["version"] for version in task["versions"]]
        for number in numbers:
            pipe.lrange(history_key(task["task"], number), 0, -1)
        found = [
            json.loads(text) | {"version": number}
            for number, texts in zip(numbers, pipe.execute(), strict=True)
            for text in texts
        ]
    return sorted(found, key=lambda line: int(line["revision"]))
