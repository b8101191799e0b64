"""The registry's HTTP API: every route in one place, most of them one line of `Registry`."""

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import FileResponse

from adapter_registry import replies, uploads
from adapter_registry.api import (
    Probe,
    Pushed,
    ReplicaList,
    Retire,
    RoutingState,
    ServerVersion,
    TaskRoute,
    VersionRecord,
)
from adapter_registry.errors import ForbiddenError
from adapter_registry.registry import Registry
from adapter_registry.settings import RegistrySettings
from prad import __version__

VERSION = "/tasks/{task}/versions/{version}"

Number = Annotated[int, Path(ge=1, le=2**31)]


def create_app(registry: Registry, settings: RegistrySettings) -> FastAPI:
    app = FastAPI(title="PrAd adapter registry", version=__version__)
    replies.install(app, registry.metrics)
    app.include_router(_reading(registry, settings), prefix="/v1")
    app.include_router(_changing(registry, settings), prefix="/v1")
    app.include_router(_service(registry, settings))
    return app


def _reading(registry: Registry, settings: RegistrySettings) -> APIRouter:
    router = APIRouter()

    @router.get("/state")
    @router.get("/tasks")
    async def state() -> RoutingState:
        return await registry.state()

    @router.get("/changes", response_model=RoutingState, responses={204: {"description": "no change yet"}})
    async def changes(
        after: int, wait: Annotated[float, Query(ge=0)] = 20.0, replica: str = ""
    ) -> RoutingState | Response:
        seconds = min(wait, settings.max_wait_seconds)
        return await registry.changes(after, seconds, replica) or Response(status_code=204)

    @router.get("/replicas")
    async def replicas() -> ReplicaList:
        return ReplicaList(replicas=registry.replicas.list())

    @router.get("/tasks/{task}")
    async def task(task: str) -> TaskRoute:
        return await registry.task(task)

    @router.get(VERSION)
    async def version(task: str, version: Number) -> VersionRecord:
        return await registry.version(task, version)

    @router.get(VERSION + "/files/{name}")
    async def file(task: str, version: Number, name: str) -> FileResponse:
        path = await registry.file(task, version, name)
        return FileResponse(path, media_type="application/octet-stream", filename=name)

    return router


def _changing(registry: Registry, settings: RegistrySettings) -> APIRouter:
    router = APIRouter(dependencies=[Depends(_refuse_foreign_origin)])

    @router.post("/tasks/{task}/versions", status_code=201, responses={200: {"description": "known already"}})
    async def push(task: str, request: Request, response: Response) -> Pushed:
        with registry.files.stage() as staged:
            await uploads.receive(
                request,
                staged,
                limit=settings.max_upload_bytes,
                local_paths=settings.local_paths_allowed,
            )
            pushed = await registry.push(task, staged)
        response.status_code = 201 if pushed.created else 200
        return pushed

    @router.post(VERSION + "/probe")
    async def probe(task: str, version: Number, body: Probe) -> VersionRecord:
        return await registry.probe(task, version, body)

    @router.post(VERSION + "/promote")
    async def promote(task: str, version: Number) -> VersionRecord:
        return await registry.promote(task, version)

    @router.post(VERSION + "/retire")
    async def retire(task: str, version: Number, body: Retire | None = None) -> VersionRecord:
        return await registry.retire(task, version, force=body is not None and body.force)

    return router


def _service(registry: Registry, settings: RegistrySettings) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str | int]:
        return {"status": "ready", "revision": (await registry.state()).revision}

    @router.get("/metrics")
    async def metrics() -> Response:
        connected = sum(replica.connected for replica in registry.replicas.list())
        page = registry.metrics.page(await registry.state(), registry.feed.waiters, connected)
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/version")
    async def version() -> ServerVersion:
        return ServerVersion(version=__version__, max_upload_bytes=settings.max_upload_bytes)

    return router


async def _refuse_foreign_origin(request: Request) -> None:
    """Browsers send any web page's POST to a loopback port, and say whose it is. Raises ForbiddenError."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ForbiddenError(f"a page of {origin} may not change this registry")
