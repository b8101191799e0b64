"""The route by which versions come: uploaded, or fetched from where the operator allows; checked, stored.

How long each part took is in the answer's Server-Timing header.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from adapter_registry import uploads
from adapter_registry.messages import Pushed, PushFrom
from adapter_registry.parameters import Task
from adapter_registry.preconditions import By
from adapter_registry.registry import Registry
from adapter_registry.replies import described
from adapter_registry.settings import RegistrySettings
from adapter_registry.sources.fetching import Sources
from adapter_registry.storage import storing

_NOT_PUSHED = described(
    {
        400: "The files are no usable adapter, the task's name is none, or the URI leads to no adapter",
        403: "It is not signed as it must be, a page of another origin asks, or nothing is fetched there",
        409: "The task has as many versions, or as large ones, as it may",
        413: "It is larger than max_upload_mib",
        501: "The URI's kind needs a package that is not installed with this registry",
        502: "What the URI names cannot be reached, or not in time",
        507: "The disk is full, or nearly",
    }
)
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}}
                    },
                }
            },
            "application/json": {
                "schema": PushFrom.model_json_schema(),
                "examples": {
                    "an OCI registry": {"value": {"uri": "oci://ghcr.io/my-org/support:1"}},
                    "the hub": {"value": {"uri": "hf://my-org/support@v1"}},
                    "a bucket": {"value": {"uri": "s3://my-bucket/support"}},
                    "this machine": {"value": {"path": "/srv/adapters/support"}},
                },
            },
        },
    }
}
"""For the documentation: the body is read by hand, within bounds."""

Wait = Annotated[
    Literal["ready"] | None,
    Query(description="Answer once a prefill service has verified it, and all connected ones know that"),
]
Patience = Annotated[float, Query(ge=0, description="Seconds that `wait` may take; answered as it is then")]


def router(registry: Registry, settings: RegistrySettings) -> APIRouter:
    """For who may push."""
    router = APIRouter()
    sources = Sources(settings.sources, settings.max_upload_bytes, settings.fetch_seconds)

    @router.post(
        "/tasks/{task}/versions",
        status_code=201,
        responses={200: {"model": Pushed, "description": "These files are a version already"}, **_NOT_PUSHED},
        openapi_extra=_BODY,
    )
    async def push(
        task: Task, request: Request, by: By, response: Response, wait: Wait = None, seconds: Patience = 20.0
    ) -> Pushed:
        """Upload an adapter's files as the next version, or name where to fetch them; the same files again
        are the same version, so that a push may be repeated.

        curl -F files=@prad.json -F files=@adapter_model.safetensors URL/v1/tasks/support/versions

        Who signed them travels as one more file, signature.json (prad adapter sign). With `wait=ready` the
        answer's `state` says how the probe went, and `pending` which replicas are not ready yet.
        """
        await registry.require_room()
        times = _Times()
        with storing(), registry.files.stage() as staged:
            with times.part("receive"):
                source = await uploads.receive(
                    request, staged, limit=settings.max_upload_bytes, sources=sources
                )
            with times.part("check"):
                adapter = await registry.admit(staged)
            with times.part("store"):
                pushed = await registry.push(task, staged, adapter, by=by, source=source)
        if wait is not None:
            with times.part("ready"):
                pushed = await registry.settled(pushed, min(seconds, settings.max_wait_seconds))
        response.status_code = 201 if pushed.created else 200
        response.headers["server-timing"] = times.header
        return pushed

    return router


class _Times:
    """Of the parts of one push."""

    def __init__(self) -> None:
        self._ms: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._ms[name] = 1e3 * (time.perf_counter() - start)

    @property
    def header(self) -> str:
        return ", ".join(f"{name};dur={ms:.1f}" for name, ms in self._ms.items())
