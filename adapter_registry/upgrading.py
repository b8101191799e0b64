"""What an older program stored of a task's routing, as today's: its current version becomes a `Routing`.

An older line of history is one change of one version, with the version that was current afterwards. Said
again in their order, to promote and to retire make the same routings as today.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from adapter_registry.routing import Routing
from adapter_registry.versions import Event


def upgraded(lines: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Routing]:
    """A task's lines of history, oldest first, each with its `version`, and the routing that they lead to."""
    routing = Routing()
    found = []
    for line in lines:
        made = _made(routing, line)
        routing = made or routing
        kept = {name: value for name, value in line.items() if name not in ("current", "replica")}
        found.append({**kept, "by": line["replica"], "routing": made})
    return found, routing


def _made(routing: Routing, line: Mapping[str, Any]) -> Routing | None:
    event, version, revision = Event(line["event"]), int(line["version"]), int(line["revision"])
    if event is Event.RETIRE:
        return routing.without(version).at(revision)
    if event is Event.PROMOTE:
        promoted = routing.divided({version: 1})
        return None if promoted.same(routing) else promoted.at(revision)
    return None


def upgraded_export(data: dict[str, Any]) -> dict[str, Any]:
    """An export of format 1 as one of format 2. What makes no sense is left for the check that follows."""
    tasks = []
    for task in data["tasks"]:
        versions = task["versions"]
        lines = sorted(
            (line | {"version": version["version"]} for version in versions for line in version["history"]),
            key=lambda line: line["revision"],
        )
        lines, routing = upgraded(lines)
        of: dict[int, list[dict[str, Any]]] = {}
        for line in lines:
            of.setdefault(line["version"], []).append(line)
        histories = [version | {"history": of.get(version["version"], [])} for version in versions]
        tasks.append({"task": task["task"], "routing": routing, "versions": histories, "history": []})
    return {**data, "format": 2, "tasks": tasks}
