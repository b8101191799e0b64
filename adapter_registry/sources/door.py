"""The one way by which the registry speaks HTTP to others: to allowed hosts only, and so after redirects.

Whoever pushes chooses the URI, and what answers there chooses where a redirect leads: without bounds both
could make the registry ask services that only it can reach. So each host is looked up in the operator's list
before anything is sent; beyond this machine it is HTTPS; credentials go to no other host than the first.
Bodies are taken as they are sent: a packed piece can be of any size unpacked, before a bound is looked at.
"""

import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from adapter_registry.errors import SourceNotAllowedError
from adapter_registry.sources.arrival import Arrival
from prad.core.host_names import is_loopback
from prad.http.asking import direct

MAX_REDIRECTS = 5
MAX_ANSWER_BYTES = 8 << 20
"""Of what is no file: the list of a repository's files, a manifest, a token."""

_CONNECT_S = 10.0
_SILENCE_S = 30.0
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


class Door:
    """For one fetch. `hosts`: HOST, HOST:PORT or *.DOMAIN that may be asked."""

    def __init__(self, arrival: Arrival, hosts: Iterable[str]) -> None:
        self._arrival = arrival
        self._hosts = frozenset(hosts)

    def read(
        self, url: str, headers: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """The answer, whatever its status, within bounds. Raises what `opened` raises."""
        with self.opened(url, headers, params) as response:
            body = bytearray()
            for piece in self.pieces(response):
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise self._arrival.refused(
                        f"{response.request.url} answered with more than {MAX_ANSWER_BYTES} bytes"
                    )
            return httpx.Response(response.status_code, headers=response.headers, content=bytes(body))

    @contextmanager
    def opened(
        self, url: str, headers: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """The answer's head; its body is to be read with `pieces`.

        Raises SourceNotAllowedError, SourceUnavailableError, AdapterRefusedError.
        """
        connections = _Connections()
        with self._failing():
            at = self._checked(httpx.URL(url).copy_merge_params(params or {}))
        first = _host(at)
        with (
            self._failing(),
            connections,
            self._arrival.cut_off_by(connections.cut),
            httpx.Client(**direct(at)) as client,
        ):
            for _ in range(1 + MAX_REDIRECTS):
                sent = headers if _host(at) == first else _without_credentials(headers)
                asked = {**sent, "accept-encoding": "identity"}
                told = {"trace": connections.note}
                with client.stream(
                    "GET", at, headers=asked, timeout=self._timeout(), extensions=told
                ) as response:
                    if response.status_code not in _REDIRECTS:
                        self._require_plain(response)
                        yield response
                        return
                    at = self._checked(at.join(response.headers.get("location", "")), at)
        raise self._arrival.away(f"more than {MAX_REDIRECTS} redirects")

    def pieces(self, response: httpx.Response) -> Iterator[bytes]:
        """Of the body. Raises SourceUnavailableError."""
        with self._failing():
            for piece in response.iter_raw():
                _ = self._arrival.seconds_left
                yield piece

    def _require_plain(self, response: httpx.Response) -> None:
        """Raises AdapterRefusedError."""
        packed = response.headers.get("content-encoding", "identity")
        if packed.strip().lower() not in ("", "identity"):
            raise self._arrival.refused(
                f"{response.request.url} answered in the content encoding {packed[:100]!r}, where identity "
                "was asked for: let that host send files as they are"
            )

    def _checked(self, url: httpx.URL, before: httpx.URL | None = None) -> httpx.URL:
        """Raises SourceNotAllowedError."""
        by = "" if before is None else f"{before.host} sends on to "
        if url.scheme != "https" and not (url.scheme == "http" and is_loopback(url.host)):
            raise SourceNotAllowedError(
                f"{self._arrival.uri}: {by}{str(url)[:200]} is not HTTPS, as it must be beyond this machine",
                param="uri",
            )
        host = _host(url)
        if not any(_matches(host, allowed) for allowed in self._hosts):
            raise SourceNotAllowedError(
                f"{self._arrival.uri}: {by}{host}, which is not a host that this registry may ask; if it "
                f"shall, add https://{host} to its setting push_from",
                param="uri",
            )
        return url

    def _timeout(self) -> httpx.Timeout:
        left = self._arrival.seconds_left
        return httpx.Timeout(min(left, _SILENCE_S), connect=min(left, _CONNECT_S))

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise self._arrival.away(f"it cannot be reached: {error or type(error).__name__}") from error


class _Connections:
    """Those of one client, each held by a handle of our own: closing a client wakes no thread that reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[socket.socket] = []
        self._over = False

    def note(self, event: str, about: Mapping[str, Any]) -> None:
        """What httpx tells of each request."""
        if event.endswith("connect_tcp.complete"):
            with self._lock:
                self._held.append(about["return_value"].get_extra_info("socket").dup())
            if self._over:
                self.cut()

    def cut(self) -> None:
        """Whoever reads or writes there finds them ended, now and later."""
        self._over = True
        with self._lock:
            for held in self._held:
                with suppress(OSError):  # the other side was first
                    held.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self.cut()
        for held in self._held:
            held.close()


def _host(url: httpx.URL) -> str:
    """HOST, or HOST:PORT where that is not the scheme's own."""
    return url.netloc.decode("ascii")


def _matches(host: str, allowed: str) -> bool:
    allowed = allowed.removesuffix(":443")
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _without_credentials(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() != "authorization"}
