"""Requests for another host are refused (`prad.core.host_names`) in front of any ASGI app; and what those are
told that ask for a path that there is not."""

from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from functools import lru_cache

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from prad.core.host_names import is_allowed

_REMEMBERED = 256
_LONGEST = 200
"""Of a path that is compared with those that there are."""


class AllowedHosts:
    """ASGI middleware. `allowed`: names, or "*.example.com" for all below one, or "*" for all.

    `refuse` makes the answer to a request for another host.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str], refuse: Callable[[str], ASGIApp]) -> None:
        self._app = app
        self._is_allowed = host_rule(allowed)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        answer = self._app if host is None or self._is_allowed(host.lower()) else self._refuse(host)
        await answer(scope, receive, send)


def host_rule(allowed: Sequence[str]) -> Callable[[str], bool]:
    """Whether a host in small letters may be asked for; `allowed` as for `AllowedHosts`. What was asked for
    lately is remembered."""
    names = tuple(name.lower() for name in allowed)
    return lru_cache(_REMEMBERED)(lambda host: is_allowed(host, names))


def unknown_path(path: str, known: Collection[str]) -> str:
    """What is told, with the one of `known` that was meant, if one is near."""
    near = get_close_matches(path[:_LONGEST], known, 1, 0.8)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"there is no {path}: {meant}GET / says where things are"
