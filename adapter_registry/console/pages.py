"""What is looked at: tasks, one task, replicas, the log, keys; and what is shown before a change is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from adapter_registry.console import charts
from adapter_registry.console.evidence import HOUR, gathered
from adapter_registry.console.rendering import Renderer, happened, shares, sliders
from adapter_registry.errors import NotFoundError
from adapter_registry.keys import Role, StoredKey
from adapter_registry.messages import TaskRoute, VersionRoute
from adapter_registry.parameters import Number
from adapter_registry.registry import Registry
from adapter_registry.traffic import Answered, LiveTraffic, Shadowed
from adapter_registry.versions import State

PAGE = 50
"""Tasks on one."""
LOG = 200
RECENT_S = 900
"""Over which "now" is taken in tables."""
_HISTORY = 30
_SLIDERS = 6
"""The latest versions that may get a part of a split; those that have one are among them in any case."""
_NAMED = 500
"""Names that the playground offers."""


@dataclass(frozen=True, slots=True)
class Row:
    """A version on its task's page."""

    route: VersionRoute
    names: tuple[str, ...]
    share: float
    shadow: float
    answered: Answered
    shadowed: Shadowed | None

    @property
    def number(self) -> int:
        return self.route.version


@dataclass(frozen=True, slots=True)
class Logged:
    """A line of the log, of a task or of a key."""

    at: str
    by: str
    what: str
    of: str
    task: str = ""
    more: str = ""


class _Listed:
    """The tasks, read anew only where something changed: pages that are open ask for them again and again."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._revision: int | None = None
        self._tasks: tuple[TaskRoute, ...] = ()

    async def tasks(self) -> tuple[TaskRoute, ...]:
        revision = self._registry.feed.revision
        if revision != self._revision:
            self._tasks = (await self._registry.state()).listed().tasks
            self._revision = revision
        return self._tasks


async def show_task(
    request: Request,
    registry: Registry,
    traffic: LiveTraffic,
    renderer: Renderer,
    task: str,
    *,
    template: str = "task.html",
    notice: str = "",
) -> Response:
    """The page, or with another template a part of it."""
    route = await registry.task(task)
    history = await registry.history(task, _HISTORY)
    failed = {v.version: (await registry.version(task, v.version)).reason for v in _failed(route)}
    rows = _rows(route, traffic)
    offered = [row for row in rows if row.route.state.answers]
    return await renderer.show(
        request,
        template,
        notice=notice,
        task=route,
        rows=rows,
        sliders=sliders(route.routing.split) if route.routing.split else {},
        offered=offered,
        slid=[row for place, row in enumerate(offered) if row.share or place < _SLIDERS],
        history=list(reversed(history.events)),
        reasons=failed,
        replicas=_replicas(registry),
        revision=registry.feed.revision,
        recent=RECENT_S,
    )


def reading(registry: Registry, traffic: LiveTraffic, renderer: Renderer) -> APIRouter:
    router = APIRouter()
    listed = _Listed(registry)

    @router.get("/")
    async def tasks(
        request: Request, q: str = "", page: Annotated[int, Query(ge=1, le=10**6)] = 1
    ) -> Response:
        known = await listed.tasks()
        found = [task for task in known if q.strip().lower() in task.task]
        shown = found[(page - 1) * PAGE : page * PAGE]
        return await renderer.show(
            request,
            "tasks.html",
            tasks=[(task, _rows(task, traffic), _total(traffic, task.task)) for task in shown],
            q=q[:100],
            page=page,
            pages=-(-len(found) // PAGE) or 1,
            found=len(found),
            **_now(registry, traffic, known),
        )

    @router.get("/now")
    async def now(request: Request) -> Response:
        """The figures on top, which a page asks for again and again."""
        return await renderer.show(request, "_now.html", **_now(registry, traffic, await listed.tasks()))

    @router.get("/tasks/{task}")
    async def task(request: Request, task: str) -> Response:
        return await show_task(request, registry, traffic, renderer, task)

    @router.get("/tasks/{task}/now")
    async def task_now(request: Request, task: str, seen: int) -> Response:
        """How its versions do, and where its routing is in force. `seen`: the routing's revision that the
        page shows."""
        route = await registry.task(task)
        return await renderer.show(
            request,
            "_task_now.html",
            task=route,
            rows=_rows(route, traffic),
            replicas=_replicas(registry),
            revision=registry.feed.revision,
            seen=seen,
            recent=RECENT_S,
        )

    @router.get("/data")
    async def data(task: str | None = None, minutes: Annotated[int, Query()] = 15) -> JSONResponse:
        """The charts' lines."""
        span: charts.Minutes = 60 if minutes == 60 else 15
        if task is None:
            return JSONResponse(charts.of_all(traffic, span))
        return JSONResponse(charts.of_task(traffic, task, span))

    @router.get("/replicas")
    async def replicas(request: Request) -> Response:
        return await renderer.show(
            request, "replicas.html", replicas=_replicas(registry), revision=registry.feed.revision
        )

    @router.get("/replicas/now")
    async def replicas_now(request: Request) -> Response:
        return await renderer.show(
            request, "_replicas.html", replicas=_replicas(registry), revision=registry.feed.revision
        )

    @router.get("/log")
    async def log(request: Request) -> Response:
        lines = [
            Logged(
                line.at,
                line.by,
                line.event,
                line.task if line.version is None else f"{line.task}@{line.version}",
                line.task,
                "; ".join(filter(None, (happened(line), line.reason))),
            )
            for line in await registry.log(LOG)
        ]
        return await renderer.show(request, "log.html", lines=_latest_first(lines))

    @router.get("/playground")
    async def playground(request: Request, a: str = "", b: str = "") -> Response:
        names = [name for task in await listed.tasks() for name in _names(task)]
        return await renderer.show(request, "playground.html", names=names[:_NAMED], a=a[:100], b=b[:100])

    return router


def confirming(registry: Registry, traffic: LiveTraffic, renderer: Renderer) -> APIRouter:
    """What is shown in a dialogue before something is changed, with what there is to know about it."""
    router = APIRouter()

    @router.get("/tasks/{task}/versions/{version}/promote")
    async def promote(request: Request, task: str, version: Number) -> Response:
        routing = (await registry.task(task)).routing
        evidence = await gathered(registry, traffic, task, version, routing.default)
        return await renderer.show(
            request, "_promote.html", task=task, version=version, routing=routing, evidence=evidence
        )

    @router.get("/tasks/{task}/versions/{version}/retire")
    async def retire(request: Request, task: str, version: Number) -> Response:
        route = await registry.task(task)
        names = route.routing.names(task, version)
        return await renderer.show(
            request, "_retire.html", task=task, version=version, routing=route.routing, names=names
        )

    @router.get("/tasks/{task}/rollback")
    async def rollback(request: Request, task: str) -> Response:
        routing = (await registry.task(task)).routing
        events = (await registry.history(task, 10_000)).events
        before = next((line for line in events if line.revision == routing.before and line.routing), None)
        default = None if before is None or before.routing is None else before.routing.default
        evidence = (
            None
            if default in (None, routing.default)
            else await gathered(registry, traffic, task, default, routing.default)
        )
        return await renderer.show(
            request, "_rollback.html", task=task, routing=routing, before=before, evidence=evidence
        )

    return router


def admin_pages(registry: Registry, renderer: Renderer) -> APIRouter:
    router = APIRouter()

    @router.get("/keys")
    async def keys(request: Request) -> Response:
        return await show_keys(request, registry, renderer)

    @router.get("/keys/{name}/revoke")
    async def revoke(request: Request, name: str) -> Response:
        return await renderer.show(request, "_revoke.html", key=await _key(registry, name))

    @router.get("/log/keys")
    async def log(request: Request) -> Response:
        """Who made and revoked keys, as the log has it of tasks."""
        lines = []
        for key in await registry.keys():
            more = key.role if key.tasks is None else f"{key.role}, for {', '.join(key.tasks)}"
            lines.append(Logged(key.created_at, key.created_by, "key made", key.name, more=more))
            if key.revoked_at is not None:
                lines.append(Logged(key.revoked_at, key.revoked_by, "key revoked", key.name))
        return await renderer.show(request, "log.html", lines=_latest_first(lines)[:LOG])

    @router.get("/tasks/{task}/versions/{version}/delete")
    async def delete(request: Request, task: str, version: Number) -> Response:
        record = await registry.version(task, version)
        return await renderer.show(request, "_delete.html", task=task, version=version, record=record)

    return router


async def show_keys(
    request: Request, registry: Registry, renderer: Renderer, *, template: str = "keys.html", **said: Any
) -> Response:
    keys = sorted(await registry.keys(), key=lambda key: (key.revoked_at is not None, key.name))
    known = {"made": None, "revoked": None} | said
    roles = [role for role in Role if role is not Role.REPLICA]
    return await renderer.show(request, template, keys=keys, roles=roles, **known)


def _rows(route: TaskRoute, traffic: LiveTraffic) -> list[Row]:
    """The latest version first."""
    routing = route.routing
    split = shares(routing.split) if routing.split else {}
    answered, shadows = traffic.versions(route.task, RECENT_S), traffic.shadows(route.task, HOUR)
    return [
        Row(
            version,
            routing.names(route.task, version.version),
            split.get(version.version, 0.0),
            routing.shadow.get(version.version, 0.0),
            answered.get(version.version, Answered()),
            shadows.get((routing.default or 0, version.version)),
        )
        for version in sorted(route.versions, key=lambda version: -version.version)
    ]


def _total(traffic: LiveTraffic, task: str) -> Answered:
    found = Answered()
    for answered in traffic.versions(task, RECENT_S).values():
        found.add(answered)
    return found


def _now(registry: Registry, traffic: LiveTraffic, tasks: Sequence[TaskRoute]) -> dict[str, Any]:
    replicas = _replicas(registry)
    return {
        "count": len(tasks),
        "versions": sum(len(task.versions) for task in tasks),
        "answering": sum(version.state.answers for task in tasks for version in task.versions),
        "replicas": [replica for replica in replicas if replica.connected],
        "whole": traffic.whole(60),
        "over": 60,
    }


def _replicas(registry: Registry) -> tuple[Any, ...]:
    return registry.replicas.list(registry.feed.revision)


def _failed(route: TaskRoute) -> list[VersionRoute]:
    return [version for version in route.versions if version.state is State.FAILED]


def _names(task: TaskRoute) -> list[str]:
    """Under which it answers."""
    plain = [task.task] if task.routing.split else []
    numbers = [f"{task.task}@{version.version}" for version in task.versions if version.state.answers]
    return [*plain, *numbers, *(f"{task.task}@{alias}" for alias in task.routing.aliases)]


def _latest_first(lines: Sequence[Logged]) -> list[Logged]:
    return sorted(lines, key=lambda line: line.at, reverse=True)


async def _key(registry: Registry, name: str) -> StoredKey:
    found = next((key for key in await registry.keys() if key.name == name), None)
    if found is None:
        raise NotFoundError(f"there is no key {name[:64]!r}", param="name")
    return found
