"""The registry's HTTP API: every route in one place, most of them one line of `Registry`."""

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi_offline import FastAPIOffline

from adapter_registry import log, pushing, replies, uploads
from adapter_registry.access import Guard, Secrets, keys_router, refuse_foreign_origin
from adapter_registry.console import create_console
from adapter_registry.disconnects import unless_gone
from adapter_registry.errors import HostNotAllowedError
from adapter_registry.keys import Role
from adapter_registry.messages import (
    Aliased,
    Probe,
    ReplicaList,
    Rerouted,
    Retire,
    RoutingState,
    ServerVersion,
    Shadowed,
    TaskHistory,
    TaskPage,
    TaskRoute,
    VersionRecord,
    Warmed,
    Weighted,
)
from adapter_registry.parameters import (
    VERSION,
    AfterTask,
    Alias,
    Everything,
    Fetching,
    FileName,
    InForce,
    Latest,
    Mark,
    Number,
    PageSize,
    ReplicaName,
    Revision,
    Seconds,
    Task,
    Troubles,
)
from adapter_registry.planning import Move, Rollback, SetAlias, SetShadow, Split, Wanted
from adapter_registry.preconditions import REROUTING, By, IfMatch, Repeatable, etag
from adapter_registry.registry import Follower, Registry
from adapter_registry.replies import described
from adapter_registry.settings import RegistrySettings
from adapter_registry.traffic import LiveTraffic, traffic_router
from adapter_registry.versions import Event
from prad import __version__
from prad.http.hosts import AllowedHosts

_RESPONSES = described({"default": "Refused or failed, and why"})
_REFUSED = described(
    {
        401: "The registry asks for a token, and none that is in force is shown",
        403: "The token's role is not enough, or a page of another origin asks",
        503: "The store is away",
    }
)
_WAITING: dict[int | str, dict[str, Any]] = {
    204: {"description": "No change yet"},
    **described(
        {403: "A replica does not show the replicas' secret", 503: "Too many wait, or the store is away"}
    ),
}
_NO_TASK = described({404: "No such task or version"})
_NOT_NOW = described({404: "No such task or version", 409: "The version's state does not allow that"})


_PLACES = {"docs": "/docs", "openapi": "/openapi.json", "tasks": "/v1/tasks"} | {
    name: f"/{name}" for name in ("health", "ready", "metrics")
}
_LISTS = tuple(f"/v1/{name}" for name in ("state", "changes", "replicas", "keys"))


def create_app(registry: Registry, settings: RegistrySettings, secrets: Secrets) -> FastAPI:
    """Each router says which role its routes need; `_service` has those that are for everybody."""
    app = FastAPIOffline(
        "/docs", None, title="PrAd adapter registry", version=__version__, responses=_RESPONSES
    )
    app.openapi = partial(replies.describe, app)  # type: ignore[method-assign]
    replies.install(app, registry.metrics, (*_PLACES.values(), *_LISTS))
    guard = Guard(registry, secrets)
    traffic = LiveTraffic() if settings.console else None
    local = Depends(refuse_foreign_origin)
    for router, needed in (
        (_reading(registry, guard), [guard.needs(Role.READ)]),
        (log.router(registry, guard), [guard.needs(Role.READ)]),
        (_following(registry, settings, guard), [guard.needs(Role.READ)]),
        (_probing(registry), [local, guard.needs(Role.REPLICA)]),
        (traffic_router(traffic), [local, guard.needs(Role.REPLICA)]),
        (pushing.router(registry, settings), [local, guard.needs(Role.PUSH)]),
        (_changing(registry), [local, guard.needs(Role.ROUTE)]),
        (_removing(registry), [local, guard.needs(Role.ADMIN)]),
        (keys_router(registry, guard), [local, guard.needs(Role.ADMIN)]),
    ):
        app.include_router(router, prefix="/v1", dependencies=needed, responses=_REFUSED)
    app.include_router(_service(registry, settings, guard))
    if traffic is not None:
        app.mount("/console", create_console(registry, settings, secrets, traffic))
    app.add_middleware(AllowedHosts, allowed=settings.hosts, refuse=_refuse_host)
    return app


async def _all(state: RoutingState) -> Response:
    """Written off the loop, where a thousand tasks would keep everybody waiting."""
    body = await asyncio.to_thread(state.model_dump_json)
    return Response(body, media_type="application/json")


def _reading(registry: Registry, guard: Guard) -> APIRouter:
    router = APIRouter()

    @router.get("/state", response_model=RoutingState)
    async def state(request: Request) -> Response:
        """All that routing needs: every version of every task, at one revision."""
        return await _all(await guard.redacted(request, await registry.state()))

    @router.get("/tasks", response_model=TaskPage)
    async def tasks(
        everything: Everything = False, after: AfterTask = "", limit: PageSize = None
    ) -> Response:
        """Tasks and their versions, by name, without failed and deleted ones unless `all` is asked for.

        With `limit` a page of them: `next` is what to ask the next one with, as `after`.
        """
        state = await registry.state()
        return await _all((state if everything else state.listed()).page(after, limit))

    @router.get("/tasks/{task}", responses=_NO_TASK)
    async def task(task: Task, response: Response) -> TaskRoute:
        """A task's routing. ETag is its revision, for If-Match of a request to change it."""
        route = await registry.task(task)
        response.headers["etag"] = etag(route.routing.revision)
        return route

    @router.get("/tasks/{task}/events", responses=_NO_TASK)
    async def events(task: Task, latest: Latest = 100) -> TaskHistory:
        """What happened to a task, who did it and when: its `latest` changes, the last one last."""
        return await registry.history(task, latest)

    @router.get(VERSION, responses=_NO_TASK)
    async def version(task: Task, version: Number) -> VersionRecord:
        """Everything about one version."""
        return await registry.version(task, version)

    @router.get(
        VERSION + "/files/{name}",
        response_class=FileResponse,
        responses=described({404: "No such file, or it was deleted", 500: "The file is damaged"}),
    )
    async def file(task: Task, version: Number, name: FileName) -> FileResponse:
        """One of a version's files, as it was pushed."""
        path = await registry.file(task, version, name)
        return FileResponse(path, media_type="application/octet-stream", filename=name)

    return router


def _following(registry: Registry, settings: RegistrySettings, guard: Guard) -> APIRouter:
    """Who follows the changes. Nobody may pass for a replica: it would be waited for."""
    router = APIRouter()

    @router.get("/changes", response_model=RoutingState, responses=_WAITING)
    async def changes(
        request: Request,
        after: Revision,
        wait: Seconds = 20.0,
        replica: ReplicaName = "",
        mark: Mark = "",
        in_force: InForce = None,
        fetching: Fetching = 0,
        trouble: Troubles = (),
    ) -> Response:
        """The state as soon as its revision is not `after`; with the `mark` that came with that one, only
        what changed since, if the registry knows: then the answer says `since` which revision.

        A `replica` says by which revision it routes new requests, `in_force` (as a rule `after`), how many
        adapters are on their way to it, and in each `trouble` what it cannot have, and why.
        """
        if replica:
            await guard.require(request, Role.REPLICA)
        address = request.client.host if request.client is not None else ""
        force = after if in_force is None else in_force
        follower = Follower(replica, address, force, tuple(trouble), fetching)
        waiting = registry.changes(after, min(wait, settings.max_wait_seconds), follower, mark)
        state = await unless_gone(request, waiting)
        await guard.require(request, Role.READ)  # the token may be what was revoked meanwhile
        return (
            Response(status_code=204) if state is None else await _all(await guard.redacted(request, state))
        )

    @router.get("/replicas")
    async def replicas(revision: Revision = 0, wait: Seconds = 0.0) -> ReplicaList:
        """The replicas, once `revision` is in force at all connected ones, or after `wait` seconds."""
        return await registry.followers(revision, min(wait, settings.max_wait_seconds))

    return router


def _probing(registry: Registry) -> APIRouter:
    """What replicas report. Nobody may pass for one: it would be believed."""
    router = APIRouter(route_class=uploads.BoundedRoute)

    @router.post(VERSION + "/probe", responses=_NOT_NOW)
    async def probe(task: Task, version: Number, body: Probe) -> VersionRecord:
        """A replica's report: how loading and running the version went."""
        return await registry.probe(task, version, body)

    return router


def _changing(registry: Registry) -> APIRouter:
    router = APIRouter(route_class=uploads.BoundedRoute)

    async def rerouted(task: str, wanted: Wanted, seen: int | None, by: str, response: Response) -> Rerouted:
        found = await registry.reroute(task, wanted, expected=seen, by=by)
        response.headers["etag"] = etag(found.routing.revision)
        return found

    @router.post(VERSION + "/promote", responses=REROUTING)
    async def promote(task: Task, version: Number, seen: IfMatch, by: By, response: Response) -> Rerouted:
        """Make a version what plain `task` means.

        Answers when that is in force at all connected prefill replicas; `pending` says where it is not yet.
        """
        return await rerouted(task, Move(version, Event.PROMOTE), seen, by, response)

    @router.post(VERSION + "/retire", responses=REROUTING)
    async def retire(
        task: Task, version: Number, seen: IfMatch, by: By, response: Response, body: Retire | None = None
    ) -> Rerouted:
        """No new requests for a version; running ones keep it. 409 while plain `task` or an alias means it,
        unless forced. Answers as promote does."""
        force = body is not None and body.force
        return await rerouted(task, Move(version, Event.RETIRE, force), seen, by, response)

    @router.put("/tasks/{task}/split", responses=REROUTING)
    async def split(task: Task, body: Weighted, seen: IfMatch, by: By, response: Response) -> Rerouted:
        """Divide requests for plain `task` between versions, by weight. Answers as promote does.

        Requests with the same sticky key (OpenAI's `user`, or the header x-prad-sticky-key) get the same
        version, on every replica and after restarts; a larger weight takes keys over, and gives none away.
        """
        return await rerouted(task, Split(body.weights), seen, by, response)

    @router.put("/tasks/{task}/shadow", responses=REROUTING)
    async def shadow(task: Task, body: Shadowed, seen: IfMatch, by: By, response: Response) -> Rerouted:
        """Let some requests for plain `task` also run under other versions. Answers as promote does.

        Whoever asks sees nothing of it, nor is it counted for them; prefill's metrics (prad_shadow_...) tell
        how far both agree, and how long both take. It is dropped whenever live requests wait.
        """
        return await rerouted(task, SetShadow(body.shares), seen, by, response)

    @router.put("/tasks/{task}/aliases/{alias}", responses=REROUTING)
    async def set_alias(
        task: Task, alias: Alias, body: Aliased, seen: IfMatch, by: By, response: Response
    ) -> Rerouted:
        """Let `task@alias` mean a version. Answers as promote does."""
        return await rerouted(task, SetAlias(alias, body.version), seen, by, response)

    @router.delete("/tasks/{task}/aliases/{alias}", responses=REROUTING)
    async def remove_alias(task: Task, alias: Alias, seen: IfMatch, by: By, response: Response) -> Rerouted:
        """Let `task@alias` mean nothing any more. Answers as promote does."""
        return await rerouted(task, SetAlias(alias, None), seen, by, response)

    @router.post("/tasks/{task}/rollback", responses=REROUTING, dependencies=[Repeatable])
    async def rollback(task: Task, seen: IfMatch, by: By, response: Response) -> Rerouted:
        """Bring the routing before back: split, aliases and shadows. Once more goes one further back.

        Not safe to repeat blindly: send If-Match. 409 if there is none before, or a version that it names
        was retired. Answers as promote does.
        """
        return await rerouted(task, Rollback(), seen, by, response)

    @router.post(VERSION + "/warm", responses=_NOT_NOW)
    async def warm(task: Task, version: Number, by: By) -> Warmed:
        """Have all connected prefill replicas load a version into memory now: no request waits for it then.

        Answers when it is there, or says where it is not. Others may push it out again: it is not pinned.
        """
        return await registry.warm(task, version, by=by)

    @router.post(
        VERSION + "/unretire",
        responses=described(
            {404: "No such task or version", 409: "Its state does not allow that, or the task has all it may"}
        ),
    )
    async def unretire(task: Task, version: Number, by: By) -> VersionRecord:
        """Bring a retired version back: it is `pushed` again, and answers once a replica has probed it."""
        return await registry.unretire(task, version, by=by)

    return router


def _removing(registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.delete(VERSION, responses=_NOT_NOW)
    async def delete(task: Task, version: Number, by: By) -> VersionRecord:
        """Remove a version's files. 409 while it answers requests: retire it first.

        Its record stays, `deleted`; the same files may be pushed again, as a new version.
        """
        return await registry.delete(task, version, by=by)

    return router


def _service(registry: Registry, settings: RegistrySettings, guard: Guard) -> APIRouter:
    """For everybody, but for the metrics."""
    router = APIRouter()

    @router.head("/", include_in_schema=False)
    @router.get("/")
    async def where() -> dict[str, str]:
        """Where things are."""
        places = _PLACES | ({"console": "/console"} if settings.console else {})
        return {"service": "PrAd adapter registry", "version": __version__, **places}

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process answers at all."""
        return {"status": "ok"}

    @router.head("/ready", include_in_schema=False)
    @router.get(
        "/ready",
        responses=described({503: "Redis or the bucket does not answer", 507: "The disk is nearly full"}),
    )
    async def ready() -> dict[str, str | int | tuple[str, ...]]:
        """507 while the disk has less free than it should, 503 while Redis or the bucket does not answer."""
        revision, warnings = await registry.ready()
        said = {"warnings": warnings} if warnings else {}
        return {"status": "ready", "revision": revision, **said}

    readers = [guard.needs(Role.READ)]

    @router.get("/metrics", response_class=PlainTextResponse, dependencies=readers, responses=_REFUSED)
    async def metrics() -> Response:
        """Prometheus' text format."""
        page = await registry.metrics_page()
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/version")
    async def version() -> ServerVersion:
        """The package's version, and the largest adapter that can be pushed."""
        return ServerVersion(version=__version__, max_upload_bytes=settings.max_upload_bytes)

    return router


def _refuse_host(host: str) -> Response:
    return replies.reply_to(
        HostNotAllowedError(
            f"this registry is not called {host[:100]!r}; if that is its name, add it to allowed_hosts",
            param="host",
        ),
        "a request for another host",
    )
