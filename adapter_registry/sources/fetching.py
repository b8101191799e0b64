"""A push by URI, fetched: where it leads, whether that is allowed, and by which protocol."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from adapter_registry.errors import MissingExtraError
from adapter_registry.sources import buckets, folders, hub, oci
from adapter_registry.sources.arrival import Arrival
from adapter_registry.sources.places import AllowedSources, Place

MOST_AT_ONCE = 4
"""Fetches; others wait for their turn."""

_EXTRAS: Mapping[str, tuple[str, str]] = MappingProxyType({"s3": ("s3", "s3fs"), "oci": ("oci", "oras")})
"""By scheme: what to install, and the module that comes with it."""


class Sources:
    """`limit`: bytes of one adapter; `seconds`: that one fetch may take, waiting for its turn included.

    Fetches have threads of their own: a source that dawdles keeps nobody else waiting.
    """

    def __init__(self, allowed: AllowedSources, limit: int, seconds: float) -> None:
        self._allowed = allowed
        self._limit = limit
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(MOST_AT_ONCE, "fetch")

    async def fetch(self, uri: str, staged: Path) -> str:
        """Fills `staged` with the adapter at `uri`; that URI, with the revision or digest that it has now.

        Raises InvalidRequestError, SourceNotAllowedError, MissingExtraError, AdapterRefusedError,
        UploadTooLargeError, SourceUnavailableError, StorageFullError.
        """
        place, allowed = self._allowed.find(uri)
        _require_extra(place.scheme)
        arrival = Arrival(staged, uri, self._limit, self._seconds)
        fetch = self._fetcher(place, allowed)

        def fetched() -> str:
            _ = arrival.seconds_left
            return fetch(arrival)

        try:
            async with asyncio.timeout(self._seconds) as bound:
                return await asyncio.get_running_loop().run_in_executor(self._pool, fetched)
        except TimeoutError as error:
            if not bound.expired():
                raise
            raise arrival.late() from error
        finally:
            arrival.end()  # its thread is another's then

    def _fetcher(self, place: Place, allowed: Place) -> Callable[[Arrival], str]:
        redirects = self._allowed.redirects
        match place.scheme:
            case "file":
                return lambda arrival: folders.copy(place, allowed, arrival)
            case "hf":
                return lambda arrival: hub.fetch(place, arrival, redirects)
            case "s3":
                return lambda arrival: buckets.fetch(place, arrival)
            case _:
                return lambda arrival: oci.fetch(place, arrival, redirects)


def _require_extra(scheme: str) -> None:
    extra, module = _EXTRAS.get(scheme, ("", ""))
    if module and find_spec(module) is None:
        raise MissingExtraError(
            f"{scheme}:// needs the package {module}, which is not installed where this registry runs: pip "
            f"install 'prad-server[{extra}]' there, and start it again",
            param="uri",
        )
