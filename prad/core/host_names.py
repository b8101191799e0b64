"""Which names of a service a request may use: no web page may reach it by a name of its own.

A page whose name is made to lead to this machine (DNS rebinding) sends that name as Host. Such a name has a
dot and is no address; so addresses, `localhost`, names without a dot (a container's, a machine's) and those
below `.localhost` are always allowed, any other name only if it is listed.
"""

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit


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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
