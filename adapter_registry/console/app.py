"""The console as an app of its own below /console: who may come in, what a refusal looks like.

Who asks is known by the same tokens as at the API, which a browser keeps in a cookie that no script can read
and that goes to /console only. Every page and every action says which role it needs, as each route of the API
does; changes come from the console's own pages alone.
"""

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapter_registry.access import Guard, Secrets, refuse_foreign_origin
from adapter_registry.console.actions import changing, keeping_keys, pushing, removing
from adapter_registry.console.pages import admin_pages, confirming, reading
from adapter_registry.console.playground import asking
from adapter_registry.console.rendering import BASE, STATIC, Renderer, in_place
from adapter_registry.errors import InvalidRequestError, RegistryError, UnauthorizedError
from adapter_registry.keys import Role
from adapter_registry.registry import Registry
from adapter_registry.replies import noted, status_of
from adapter_registry.settings import RegistrySettings
from adapter_registry.traffic import LiveTraffic
from adapter_registry.uploads import BoundedRoute

logger = logging.getLogger(__name__)

COOKIE = "prad_token"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Of every answer. Scripts and styles are files of ours, nothing is asked of any other place, and no page of
another place shows these in a frame."""


def create_console(
    registry: Registry, settings: RegistrySettings, secrets: Secrets, traffic: LiveTraffic
) -> ASGIApp:
    """Each router says which role its routes need; signing in, style and script are for everybody."""
    guard = Guard(registry, secrets, cookie=COOKIE)
    renderer = Renderer(guard, settings)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    local = Depends(refuse_foreign_origin)
    for router, needed in (
        (reading(registry, traffic, renderer), [guard.needs(Role.READ)]),
        (confirming(registry, traffic, renderer), [guard.needs(Role.ROUTE)]),
        (admin_pages(registry, renderer), [guard.needs(Role.ADMIN)]),
        (asking(settings), [local, guard.needs(Role.READ)]),
        (pushing(registry, settings, renderer), [local, guard.needs(Role.PUSH)]),
        (changing(registry, traffic, renderer), [local, guard.needs(Role.ROUTE)]),
        (removing(registry, traffic, renderer), [local, guard.needs(Role.ADMIN)]),
        (keeping_keys(registry, guard, renderer), [local, guard.needs(Role.ADMIN)]),
    ):
        app.include_router(router, dependencies=needed)
    app.include_router(_signing_in(registry, guard, renderer), dependencies=[local])
    app.mount("/static", StaticFiles(directory=STATIC))
    _install_refusals(app, registry, renderer)
    return _Headers(app)  # around it: middleware of the app's own sees no answer to what nobody expected


def _signing_in(registry: Registry, guard: Guard, renderer: Renderer) -> APIRouter:
    router = APIRouter(route_class=BoundedRoute)

    @router.get("/sign-in")
    async def form(request: Request) -> Response:
        return await renderer.show(request, "sign_in.html", wrong=False)

    @router.post("/sign-in")
    async def sign_in(request: Request, token: Annotated[str, Form()]) -> Response:
        """Keeps the token in the browser until that is closed."""
        if not await guard.knows(token):
            message, code = "no operator has the token that was typed in", UnauthorizedError.code
            _note(registry, request, HTTPStatus.UNAUTHORIZED, message, code)
            return await renderer.show(request, "sign_in.html", status=HTTPStatus.UNAUTHORIZED, wrong=True)
        answer = RedirectResponse(f"{BASE}/", HTTPStatus.SEE_OTHER)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, token.strip(), path=BASE, httponly=True, samesite="strict", secure=secure)
        return answer

    @router.post("/sign-out")
    async def sign_out() -> Response:
        answer = RedirectResponse(f"{BASE}/sign-in", HTTPStatus.SEE_OTHER)
        answer.delete_cookie(COOKIE, path=BASE, httponly=True, samesite="strict")
        return answer

    return router


def _install_refusals(app: FastAPI, registry: Registry, renderer: Renderer) -> None:
    """What fails is said on a page, or in the notice of the one that is open."""

    async def say(request: Request, status: int, message: str, code: str) -> Response:
        _note(registry, request, status, message, code)
        return await told(request, status, message, code)

    async def told(request: Request, status: int, message: str, code: str) -> Response:
        if not in_place(request):
            return await renderer.show(request, "refused.html", status=status, message=message, code=code)
        answer = await renderer.show(request, "_refusal.html", status=status, message=message, code=code)
        answer.headers["hx-retarget"] = "#notice"
        answer.headers["hx-reswap"] = "innerHTML"
        return answer

    async def ours(request: Request, error: RegistryError) -> Response:
        return await say(request, status_of(error), error.message, error.code)

    async def who(request: Request, error: UnauthorizedError) -> Response:
        _note(registry, request, HTTPStatus.UNAUTHORIZED, error.message, error.code)
        if in_place(request):
            return Response(status_code=HTTPStatus.UNAUTHORIZED, headers={"hx-redirect": f"{BASE}/sign-in"})
        return await renderer.show(request, "sign_in.html", status=HTTPStatus.UNAUTHORIZED, wrong=False)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors()]
        status = status_of(InvalidRequestError(""))
        return await say(request, status, "; ".join(problems), InvalidRequestError.code)

    async def http(request: Request, error: HTTPException) -> Response:
        code = HTTPStatus(error.status_code).name.lower()
        return await say(request, error.status_code, str(error.detail), code)

    async def unexpected(request: Request, _: Exception) -> Response:
        """The API around this app is raised the same error: it counts it and logs it."""
        return await told(request, 500, "the registry failed; its log says why", "internal_error")

    handlers: dict[type[Exception], Callable[..., Awaitable[Response]]] = {
        RegistryError: ours,
        UnauthorizedError: who,
        RequestValidationError: invalid,
        HTTPException: http,
        Exception: unexpected,
    }
    for kind, handle in handlers.items():
        app.add_exception_handler(kind, handle)


def _note(registry: Registry, request: Request, status: int, message: str, code: str) -> None:
    """Of whatever fails a line in the log and one in the metrics; never of a token."""
    registry.metrics.error(code)
    noted(f"{request.method} {request.url.path}", status, code, message)


class _Headers:
    """ASGI middleware: `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_more)
