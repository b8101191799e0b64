"""What is changed, each by the same call of `Registry` as in the API; the answer is the part of the page that
changed with it.

A form says at which revision its page saw the routing, as If-Match does at the API: two operators cannot
overwrite each other unseen.
"""

from typing import Annotated, TypeVar

from fastapi import APIRouter, Form, Query, Request, Response
from pydantic import Field, ValidationError

from adapter_registry import uploads
from adapter_registry.access import Guard
from adapter_registry.console.pages import show_keys, show_task
from adapter_registry.console.rendering import Renderer, joined, routed
from adapter_registry.errors import InvalidRequestError
from adapter_registry.keys import KeyLimits, NewKey, Role
from adapter_registry.messages import Rerouted, Shadowed, Weighted
from adapter_registry.parameters import Number
from adapter_registry.planning import Move, Rollback, SetAlias, SetShadow, Split, Wanted
from adapter_registry.preconditions import By
from adapter_registry.registry import Registry
from adapter_registry.settings import RegistrySettings
from adapter_registry.storage import storing
from adapter_registry.traffic import LiveTraffic
from adapter_registry.uploads import BoundedRoute
from adapter_registry.versions import Event

T = TypeVar("T")

VERSION = "/tasks/{task}/versions/{version}"
MOST = 16

Seen = Annotated[int, Form(alias="revision", ge=0, le=2**63)]
"""The routing's revision that the page shows."""
Versions = Annotated[list[Annotated[int, Field(ge=1, le=2**31)]], Form(alias="version", max_length=MOST)]
Optional = Annotated[int | None, Form(ge=1, le=2**53)]


def changing(registry: Registry, traffic: LiveTraffic, renderer: Renderer) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute)

    async def rerouted(request: Request, task: str, wanted: Wanted, seen: int, by: str) -> Response:
        found = await registry.reroute(task, wanted, expected=seen, by=by)
        return await shown(request, task, _in_force(found))

    async def shown(request: Request, task: str, notice: str) -> Response:
        return await show_task(
            request, registry, traffic, renderer, task, template="_task.html", notice=notice
        )

    @router.post(VERSION + "/promote")
    async def promote(request: Request, task: str, version: Number, seen: Seen, by: By) -> Response:
        return await rerouted(request, task, Move(version, Event.PROMOTE), seen, by)

    @router.post(VERSION + "/retire")
    async def retire(
        request: Request,
        task: str,
        version: Number,
        seen: Seen,
        by: By,
        force: Annotated[bool, Form()] = False,
    ) -> Response:
        return await rerouted(request, task, Move(version, Event.RETIRE, force), seen, by)

    @router.post("/tasks/{task}/split")
    async def split(
        request: Request,
        task: str,
        seen: Seen,
        by: By,
        versions: Versions,
        weights: Annotated[list[int], Form(alias="weight", max_length=MOST)],
    ) -> Response:
        """A weight for each version; with none it is out."""
        found = {number: weight for number, weight in _of_each(versions, weights).items() if weight}
        try:
            wanted = Split(Weighted(weights=found).weights)
        except ValidationError as error:
            raise InvalidRequestError(
                f"a split needs a version with a weight of 1 or more: {error.errors()[0]['msg']}",
                param="weight",
            ) from error
        return await rerouted(request, task, wanted, seen, by)

    @router.post("/tasks/{task}/shadow")
    async def shadow(
        request: Request,
        task: str,
        seen: Seen,
        by: By,
        versions: Versions,
        given: Annotated[list[float], Form(alias="share", max_length=MOST)],
    ) -> Response:
        """A share for each version, in percent; 0 ends it."""
        found = {number: share for number, share in _of_each(versions, given).items() if share}
        try:
            wanted = SetShadow(Shadowed(shares=found).shares)
        except ValidationError as error:
            raise InvalidRequestError(
                f"shares are percents of the requests, together at most 100: {error.errors()[0]['msg']}",
                param="share",
            ) from error
        return await rerouted(request, task, wanted, seen, by)

    @router.post("/tasks/{task}/alias")
    async def alias(
        request: Request,
        task: str,
        seen: Seen,
        by: By,
        name: Annotated[str, Form(max_length=64)],
        version: Annotated[str, Form(pattern=r"^([1-9][0-9]{0,8})?$")] = "",
    ) -> Response:
        """Of no version: it is gone."""
        wanted = SetAlias(name.strip(), int(version) if version else None)
        return await rerouted(request, task, wanted, seen, by)

    @router.post("/tasks/{task}/rollback")
    async def rollback(request: Request, task: str, seen: Seen, by: By) -> Response:
        return await rerouted(request, task, Rollback(), seen, by)

    @router.post(VERSION + "/warm")
    async def warm(request: Request, task: str, version: Number, by: By) -> Response:
        found = await registry.warm(task, version, by=by)
        parts = [f"in memory at {', '.join(found.ready)}"] if found.ready else []
        parts += [f"not at {name}: {why}" for name, why in found.failed.items()]
        parts += [f"not known yet of {', '.join(found.pending)}"] if found.pending else []
        said = "; ".join(parts) or "no prefill replica is connected"
        return await shown(request, task, f"{task}@{version}: {said}.")

    @router.post(VERSION + "/unretire")
    async def unretire(request: Request, task: str, version: Number, by: By) -> Response:
        await registry.unretire(task, version, by=by)
        return await shown(
            request, task, f"{task}@{version} is back, and answers once a replica has probed it."
        )

    return router


def removing(registry: Registry, traffic: LiveTraffic, renderer: Renderer) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute)

    @router.post(VERSION + "/delete")
    async def delete(request: Request, task: str, version: Number, by: By) -> Response:
        await registry.delete(task, version, by=by)
        notice = f"The files of {task}@{version} are deleted; its record stays."
        return await show_task(
            request, registry, traffic, renderer, task, template="_task.html", notice=notice
        )

    return router


def pushing(registry: Registry, settings: RegistrySettings, renderer: Renderer) -> APIRouter:
    router = APIRouter()

    @router.get("/push")
    async def form(request: Request, task: str = "") -> Response:
        return await renderer.show(request, "push.html", task=task[:64])

    @router.post("/push")
    async def push(request: Request, by: By, task: Annotated[str, Query(max_length=200)]) -> Response:
        """The same body as the API's push takes, of a form."""
        await registry.require_room()
        with storing(), registry.files.stage() as staged:
            await uploads.receive(request, staged, limit=settings.max_upload_bytes, sources=None)
            adapter = await registry.admit(staged)
            pushed = await registry.push(task, staged, adapter, by=by)
        return await renderer.show(request, "_pushed.html", pushed=pushed)

    return router


def keeping_keys(registry: Registry, guard: Guard, renderer: Renderer) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute)

    @router.post("/keys")
    async def create(
        request: Request,
        by: By,
        name: Annotated[str, Form(max_length=100)],
        role: Annotated[Role, Form()] = Role.COMPLETE,
        tasks: Annotated[str, Form(max_length=10_000)] = "",
        requests_per_minute: Optional = None,
        tokens_per_minute: Optional = None,
        concurrent: Optional = None,
    ) -> Response:
        """The new key's token is in this answer and nowhere else."""
        limits = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "concurrent": concurrent,
        }
        named = tuple(tasks.replace(",", " ").split()) or None
        try:
            new = NewKey(name=name.strip(), role=role, tasks=named, limits=KeyLimits(**limits))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise InvalidRequestError(f"{where}: {problem['msg']}" if where else problem["msg"]) from error
        await guard.require_no_lockout(beside=new.role)
        made = await registry.issue(new, by=by)
        return await show_keys(request, registry, renderer, template="_keys.html", made=made)

    @router.post("/keys/{name}/revoke")
    async def revoke(request: Request, name: str, by: By) -> Response:
        await guard.require_no_lockout(without=name)
        revoked = await registry.revoke(name, by=by)
        return await show_keys(request, registry, renderer, template="_keys.html", revoked=revoked)

    return router


def _in_force(found: Rerouted) -> str:
    now = f"{found.task} now means {routed(found.routing)}"
    if found.pending:
        return f"{now}. Not in force yet at {joined(found.pending)}, which still route by an earlier one."
    return (
        f"{now}, in force at {joined(found.replicas)}." if found.replicas else f"{now}; no replica follows."
    )


def _of_each(versions: list[int], values: list[T]) -> dict[int, T]:
    """The last value that is given for a version: the form has those in force first."""
    if len(versions) != len(values):
        raise InvalidRequestError("expected a value for each version", param="version")
    return dict(zip(versions, values, strict=True))
