"""The one way by which the registry speaks HTTP to others: to allowed hosts only, and so after redirects.

Whoever pushes chooses the URI, and what answers there chooses where a redirect leads: without bounds both
could make the registry ask services that only it can reach. So each host is looked up in the operator's list
before anything is sent; beyond this machine it is HTTPS; credentials go to no other host than the first.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address

import httpx

from adapter_registry.errors import SourceNotAllowedError
from adapter_registry.sources.arrival import Arrival

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
            plain = {
                k: v for k, v in response.headers.items() if k not in ("content-encoding", "content-length")
            }
            return httpx.Response(response.status_code, headers=plain, content=bytes(body))

    @contextmanager
    def opened(
        self, url: str, headers: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """The answer's head; its body is to be read with `pieces`.

        Raises SourceNotAllowedError, SourceUnavailableError.
        """
        with self._failing():
            at = self._checked(httpx.URL(url).copy_merge_params(params or {}))
        first = _host(at)
        with self._failing(), httpx.Client(trust_env=not is_here(at.host)) as client:
            for _ in range(1 + MAX_REDIRECTS):
                sent = headers if _host(at) == first else _without_credentials(headers)
                with client.stream("GET", at, headers=dict(sent), timeout=self._timeout()) as response:
                    if response.status_code not in _REDIRECTS:
                        yield response
                        return
                    at = self._checked(at.join(response.headers.get("location", "")), at)
        raise self._arrival.away(f"more than {MAX_REDIRECTS} redirects")

    def pieces(self, response: httpx.Response) -> Iterator[bytes]:
        """Of the body. Raises SourceUnavailableError."""
        with self._failing():
            for piece in response.iter_bytes():
                _ = self._arrival.seconds_left
                yield piece

    def _checked(self, url: httpx.URL, before: httpx.URL | None = None) -> httpx.URL:
        """Raises SourceNotAllowedError."""
        by = "" if before is None else f"{before.host} sends on to "
        if url.scheme != "https" and not (url.scheme == "http" and is_here(url.host)):
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


def _host(url: httpx.URL) -> str:
    """HOST, or HOST:PORT where that is not the scheme's own."""
    return url.netloc.decode("ascii")


def _matches(host: str, allowed: str) -> bool:
    allowed = allowed.removesuffix(":443")
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _without_credentials(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() != "authorization"}


def is_here(host: str) -> bool:
    """Whether that is this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
