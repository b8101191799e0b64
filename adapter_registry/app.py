"""The registry's HTTP API: every route in one place, most of them one line of `Registry`."""

import asyncio
import hmac
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi_offline import FastAPIOffline

from adapter_registry import replies, uploads
from adapter_registry.api import (
    ErrorReply,
    Probe,
    Pushed,
    ReplicaList,
    Rerouted,
    Retire,
    RoutingState,
    ServerVersion,
    TaskRoute,
    VersionRecord,
)
from adapter_registry.errors import ForbiddenError, HostNotAllowedError, NotAReplicaError
from adapter_registry.preconditions import REROUTING, IfMatch, etag
from adapter_registry.registry import Follower, Registry
from adapter_registry.settings import RegistrySettings
from adapter_registry.storage import storing
from prad import __version__
from prad.http.hosts import AllowedHosts

VERSION = "/tasks/{task}/versions/{version}"

T = TypeVar("T")

Number = Annotated[int, Path(ge=1, le=2**31)]
Revision = Annotated[int, Query(ge=-(2**63), lt=2**63)]
Seconds = Annotated[float, Query(ge=0)]
ReplicaName = Annotated[str, Query(max_length=256)]

_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorReply, "description": "Refused or failed, and why"}
}


def create_app(registry: Registry, settings: RegistrySettings, secret: str | None = None) -> FastAPI:
    """`secret`: what prefill replicas must show; None: nothing."""
    app = FastAPIOffline(
        "/docs", None, title="PrAd adapter registry", version=__version__, responses=_RESPONSES
    )
    replies.install(app, registry.metrics)
    app.include_router(_reading(registry), prefix="/v1")
    app.include_router(_following(registry, settings, secret), prefix="/v1")
    app.include_router(_pushing(registry, settings), prefix="/v1")
    app.include_router(_changing(registry), prefix="/v1")
    app.include_router(_service(registry, settings))
    app.add_middleware(AllowedHosts, allowed=settings.hosts, refuse=_refuse_host)
    return app


def _reading(registry: Registry) -> APIRouter:
    router = APIRouter()

    @router.get("/state")
    async def state() -> RoutingState:
        """All that routing needs: every version of every task, at one revision."""
        return await registry.state()

    @router.get("/tasks")
    async def tasks(
        everything: Annotated[
            bool, Query(alias="all", description="Failed and deleted ones as well")
        ] = False,
    ) -> RoutingState:
        """Tasks and their versions, without failed and deleted ones unless `all` is asked for."""
        state = await registry.state()
        return state if everything else state.listed()

    @router.get("/tasks/{task}")
    async def task(task: str, response: Response) -> TaskRoute:
        """A task's routing. ETag is its revision, for If-Match of a request to change it."""
        route = await registry.task(task)
        response.headers["etag"] = etag(route.routing_revision)
        return route

    @router.get(VERSION)
    async def version(task: str, version: Number) -> VersionRecord:
        return await registry.version(task, version)

    @router.get(VERSION + "/files/{name}")
    async def file(task: str, version: Number, name: str) -> FileResponse:
        path = await registry.file(task, version, name)
        return FileResponse(path, media_type="application/octet-stream", filename=name)

    return router


def _following(registry: Registry, settings: RegistrySettings, secret: str | None) -> APIRouter:
    """What prefill replicas do. Nobody may pass for one: it would be waited for, and its probes believed."""
    router = APIRouter(route_class=uploads.BoundedRoute)

    def require_replica(request: Request) -> None:
        shown = request.headers.get("authorization", "").encode()
        if secret is not None and not hmac.compare_digest(shown, f"Bearer {secret}".encode()):
            raise NotAReplicaError(
                "prefill replicas show the registry's secret (set registry_secret_file to the file that is "
                "the registry's replica_secret_file)"
            )

    @router.get("/changes", response_model=RoutingState, responses={204: {"description": "no change yet"}})
    async def changes(
        request: Request,
        after: Revision,
        wait: Seconds = 20.0,
        replica: ReplicaName = "",
        in_force: Revision | None = None,
    ) -> RoutingState | Response:
        """The state as soon as its revision is not `after`.

        A `replica` says by which revision it routes new requests, `in_force` (as a rule `after`).
        """
        if replica:
            require_replica(request)
        address = request.client.host if request.client is not None else ""
        follower = Follower(replica, address, after if in_force is None else in_force)
        waiting = registry.changes(after, min(wait, settings.max_wait_seconds), follower)
        return await _unless_gone(request, waiting) or Response(status_code=204)

    @router.get("/replicas")
    async def replicas(revision: Revision = 0, wait: Seconds = 0.0) -> ReplicaList:
        """The replicas, once `revision` is in force at all connected ones, or after `wait` seconds."""
        return await registry.followers(revision, min(wait, settings.max_wait_seconds))

    @router.post(VERSION + "/probe", dependencies=[Depends(_refuse_foreign_origin), Depends(require_replica)])
    async def probe(task: str, version: Number, body: Probe) -> VersionRecord:
        """A replica's report: how loading and running the version went."""
        return await registry.probe(task, version, body)

    return router


def _pushing(registry: Registry, settings: RegistrySettings) -> APIRouter:
    router = APIRouter(dependencies=[Depends(_refuse_foreign_origin)])

    @router.post("/tasks/{task}/versions", status_code=201, responses={200: {"description": "known already"}})
    async def push(task: str, request: Request, response: Response) -> Pushed:
        """Upload an adapter's files as the next version; the same files again are the same version."""
        await registry.require_room()
        with storing(), registry.files.stage() as staged:
            await uploads.receive(
                request,
                staged,
                limit=settings.max_upload_bytes,
                local_paths=settings.local_paths_allowed,
            )
            pushed = await registry.push(task, staged)
        response.status_code = 201 if pushed.created else 200
        return pushed

    return router


def _changing(registry: Registry) -> APIRouter:
    router = APIRouter(route_class=uploads.BoundedRoute, dependencies=[Depends(_refuse_foreign_origin)])

    @router.post(VERSION + "/promote", responses=REROUTING)
    async def promote(task: str, version: Number, seen: IfMatch, response: Response) -> Rerouted:
        """Make a version what plain `task` means.

        Answers when that is in force at all connected prefill replicas; `pending` says where it is not yet.
        """
        rerouted = await registry.promote(task, version, expected=seen)
        response.headers["etag"] = etag(rerouted.routing_revision)
        return rerouted

    @router.post(VERSION + "/retire", responses=REROUTING)
    async def retire(
        task: str, version: Number, seen: IfMatch, response: Response, body: Retire | None = None
    ) -> Rerouted:
        """No new requests for a version; running ones keep it. Answers as promote does."""
        force = body is not None and body.force
        rerouted = await registry.retire(task, version, force=force, expected=seen)
        response.headers["etag"] = etag(rerouted.routing_revision)
        return rerouted

    @router.post(VERSION + "/unretire")
    async def unretire(task: str, version: Number) -> VersionRecord:
        """Bring a retired version back: it is `pushed` again, and answers once a replica has probed it."""
        return await registry.unretire(task, version)

    @router.delete(VERSION)
    async def delete(task: str, version: Number) -> VersionRecord:
        """Remove a version's files. 409 while it answers requests: retire it first.

        Its record stays, `deleted`; the same files may be pushed again, as a new version.
        """
        return await registry.delete(task, version)

    return router


def _service(registry: Registry, settings: RegistrySettings) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str | int | tuple[str, ...]]:
        """507 while the disk has less free than it should, 503 while Redis does not answer."""
        revision, warnings = await registry.ready()
        said = {"warnings": warnings} if warnings else {}
        return {"status": "ready", "revision": revision, **said}

    @router.get("/metrics")
    async def metrics() -> Response:
        page = await registry.metrics_page()
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/version")
    async def version() -> ServerVersion:
        return ServerVersion(version=__version__, max_upload_bytes=settings.max_upload_bytes)

    return router


async def _refuse_foreign_origin(request: Request) -> None:
    """Browsers send any web page's POST to a loopback port, and say whose it is. Raises ForbiddenError."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise ForbiddenError(f"a page of {origin[:200]} may not change this registry")


def _refuse_host(host: str) -> Response:
    return replies.reply_to(
        HostNotAllowedError(
            f"this registry is not called {host[:100]!r}; if that is its name, add it to allowed_hosts",
            param="host",
        ),
        "a request for another host",
    )


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T | None:
    """The answer; None if the client hangs up first, for whom nobody goes on waiting then."""
    answering = asyncio.ensure_future(answer)
    hung_up = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({answering, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        answering.cancel()
        hung_up.cancel()
        await asyncio.gather(answering, hung_up, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
