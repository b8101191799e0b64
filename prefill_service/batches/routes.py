"""The endpoints of files and batches. Each key has its own: others' are not there for it."""

from collections.abc import Sequence
from typing import Annotated, Protocol, TypeVar

from fastapi import APIRouter, Path, Request
from starlette.responses import FileResponse, Response

from prefill_service.api.described import REFUSALS, body_schema, form_schema, query_schema
from prefill_service.api.intake import ApiLimits, client_of, read_body
from prefill_service.api.problems import shown
from prefill_service.batches.records import Batch, NewBatch
from prefill_service.batches.runner import Batches
from prefill_service.batches.uploads import receive
from prefill_service.errors import InvalidRequestError, NotFoundError

Json = dict[str, object]
FileName = Annotated[str, Path(description="As `id` of the file says it")]
BatchName = Annotated[str, Path(description="As `id` of the batch says it")]

MOST_LISTED = {"files": 10_000, "batches": 100}
_LISTED = {"files": 10_000, "batches": 20}
"""Where a request says nothing."""
_UPLOAD = form_schema(
    {
        "purpose": {"const": "batch", "description": "What it is for"},
        "file": {"type": "string", "format": "binary", "description": "Its bytes, as a part with a name"},
        "expires_after[anchor]": {"type": "string", "description": "Of OpenAI; changes nothing"},
        "expires_after[seconds]": {"type": "integer", "minimum": 1, "description": "How long it is kept"},
    },
    required=("purpose", "file"),
)


def _query(kind: str, **more: Json) -> Json:
    told = f"At most so many. Absent: {_LISTED[kind]}"
    return query_schema(
        limit={"type": "integer", "minimum": 1, "maximum": MOST_LISTED[kind], "description": told},
        after={"type": "string", "description": "Only what follows this one: its `id`"},
        order={"enum": ["asc", "desc"], "description": "asc: the oldest first. Absent: desc"},
        **more,
    )


class Listed(Protocol):
    id: str

    def shown(self) -> Json: ...


T = TypeVar("T", bound=Listed)


def batch_routes(kept: Batches | None, limits: ApiLimits) -> APIRouter:
    """`kept` None: neither is served, and every answer says how to switch them on."""
    router = APIRouter(tags=["files and batches"], responses=REFUSALS)

    def batches() -> Batches:
        if kept is None:
            raise NotFoundError(
                "this server keeps no files, so there are no batches: its operator can name a folder for "
                "them, --files-dir (PRAD_PREFILL_FILES_DIR); `prad batch` asks any server, without one",
                code="files_off",
            )
        return kept

    @router.post("/v1/files", openapi_extra=_UPLOAD)
    async def create_file(request: Request) -> Json:
        """Keeps a file of requests, one JSON object a line; multipart, with purpose `batch`."""
        return (await receive(request, batches().files, limits, _owner(request))).shown()

    purpose_of: Json = {"type": "string", "description": "Only files that are for this. Absent: all"}

    @router.get("/v1/files", openapi_extra=_query("files", purpose=purpose_of))
    async def list_files(request: Request) -> Json:
        """The newest first; `purpose`, `limit`, `after` and `order` as OpenAI has them."""
        files, purpose = batches().files.of(_owner(request)), request.query_params.get("purpose")
        return _page(request, "files", [file for file in files if purpose in (None, file.purpose)])

    @router.get("/v1/files/{name}")
    async def one_file(request: Request, name: FileName) -> Json:
        """What is known of it."""
        return batches().files.find(name, _owner(request)).shown()

    @router.get("/v1/files/{name}/content", response_class=FileResponse)
    async def file_content(request: Request, name: FileName) -> Response:
        """Its bytes."""
        files = batches().files
        return FileResponse(files.content(files.find(name, _owner(request))), media_type="application/jsonl")

    @router.delete("/v1/files/{name}")
    async def delete_file(request: Request, name: FileName) -> Json:
        """Frees its room; not while a batch reads it."""
        file = batches().files.find(name, _owner(request))
        await batches().delete(file)
        return {"id": file.id, "object": "file", "deleted": True}

    @router.post("/v1/batches", openapi_extra=body_schema(NewBatch))
    async def create_batch(request: Request) -> Json:
        """Asks every line of a file, behind all live requests, and keeps the answers as files."""
        running = batches()
        wanted = await read_body(request, NewBatch, limits)
        return _shown(running, await running.create(wanted, _owner(request)))

    @router.get("/v1/batches", openapi_extra=_query("batches"))
    async def list_batches(request: Request) -> Json:
        """The newest first; `limit` and `after` as OpenAI has them."""
        return _page(request, "batches", batches().of(_owner(request)))

    @router.get("/v1/batches/{name}")
    async def one_batch(request: Request, name: BatchName) -> Json:
        """How far it is."""
        return _shown(batches(), batches().find(name, _owner(request)))

    @router.post("/v1/batches/{name}/cancel")
    async def cancel_batch(request: Request, name: BatchName) -> Json:
        """Ends it; what is answered is kept."""
        batch = batches().find(name, _owner(request))
        await batches().cancel(batch)
        return _shown(batches(), batch)

    return router


def _shown(batches: Batches, batch: Batch) -> Json:
    waits = batches.files.full(batch.owner) and not batch.has_ended
    return {**batch.shown(), "prad": {"waits_for_room": waits}}


def _owner(request: Request) -> str | None:
    client = client_of(request)
    return None if client is None else client.name


def _page(request: Request, kind: str, found: Sequence[T]) -> Json:
    query = request.query_params
    limit, most = query.get("limit", str(_LISTED[kind])), MOST_LISTED[kind]
    if not limit.isdecimal() or len(limit) > 6 or not 0 < int(limit) <= most:
        raise InvalidRequestError(f"'limit': expected 1 to {most}, got {shown(limit)}", param="limit")
    if (order := query.get("order", "desc")) not in ("asc", "desc"):
        raise InvalidRequestError(f"'order': expected asc or desc, got {shown(order)}", param="order")
    found = found if order == "desc" else found[::-1]
    if (after := query.get("after")) is not None:
        place = next((at for at, each in enumerate(found) if each.id == after), None)
        if place is None:
            raise InvalidRequestError(f"'after': there is no {shown(after)} in this list", param="after")
        found = found[place + 1 :]
    page = [each.shown() for each in found[: int(limit)]]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **ends, "has_more": len(found) > len(page)}
