"""Which names of this service a request may use: no web page may reach it by a name of its own.

A page whose name is made to lead to this machine (DNS rebinding) sends that name as Host. Such a name has a
dot and is no address; so addresses, `localhost`, names without a dot (a container's, a machine's) and those
below `.localhost` are always allowed, any other name only if it is listed.
"""

import ipaddress
from collections.abc import Callable, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

_REMEMBERED = 256


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


def is_allowed(host: str, allowed: Sequence[str]) -> bool:
    """`host` as in the Host header, with or without a port."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return False
    if _is_address(name) or (name and "." not in name) or name.endswith(".localhost"):
        return True
    return any(
        pattern == "*" or name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:]))
        for pattern in allowed
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
