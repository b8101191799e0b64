"""What operators and their machines ask: alive, ready, how busy, which build."""

from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from prefill_service.api.context import Context


def health_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["operations"])
    package_version = version("prad-server")

    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while the process answers at all."""
        return {"status": "ok"}

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """200 once requests can be served, else 503 with the reasons."""
        reasons = context.readiness.reasons()
        if reasons:
            return JSONResponse({"status": "not ready", "reasons": reasons}, 503)
        return JSONResponse({"status": "ready", "reasons": []})

    @router.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(
            generate_latest(context.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    @router.get("/version")
    async def build() -> dict[str, str]:
        """The package's version and exactly which model this is."""
        return {"version": package_version, "model_fingerprint": context.model.fingerprint}

    return router
