"""How others reach the registry: `AsyncRegistryClient` in prefill services, `RegistryClient` in the CLI.

A prefill service reads `state()`, then waits in `changes(after=revision)`; what is new it fetches, probes and
reports. Both clients raise the errors of `errors.py`: what the server refused as the same class, and
RegistryUnreachableError where no registry answers.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import httpx
from pydantic import BaseModel

from adapter_registry import calls
from adapter_registry.api import Probe, Pushed, ReplicaList, RoutingState, TaskRoute, VersionRecord
from adapter_registry.cache import AdapterCache
from adapter_registry.calls import Call
from adapter_registry.errors import RegistryUnreachableError
from adapter_registry.names import check_task
from prad.artefact import Artefact

M = TypeVar("M", bound=BaseModel)

DEFAULT_WAIT = 20.0
"""Seconds that a request for changes waits at the server."""

_PIECE_BYTES = 1 << 20  # of a download that are written at once


class AsyncRegistryClient:
    """For prefill services. `replica` names this one to operators; fetched adapters stay in `cache_dir`."""

    def __init__(self, url: str, *, cache_dir: Path, replica: str, timeout: float = 10.0) -> None:
        self._url = url
        self._timeout = timeout
        self._replica = replica
        self._cache = AdapterCache(cache_dir)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout, trust_env=not _on_loopback(url))

    async def state(self) -> RoutingState:
        """The whole routing state, now."""
        return await self._send(calls.state())

    async def changes(self, after: int, wait: float = DEFAULT_WAIT) -> RoutingState | None:
        """The state as soon as its revision is not `after`; None if it still is after `wait` seconds.

        The server may answer sooner than `wait`, also with None. Raises TooManyWaitersError.
        """
        call = calls.changes(after, wait, self._replica)
        response = await self._exchange(call)
        return None if response.status_code == httpx.codes.NO_CONTENT else call.read(response)

    async def version(self, task: str, version: int) -> VersionRecord:
        """Everything about one version. Raises NotFoundError."""
        return await self._send(calls.version(task, version))

    async def probe(self, task: str, version: int, *, ok: bool, reason: str = "") -> VersionRecord:
        """Reports a probe.

        Raises NotFoundError, and IllegalTransitionError if the version was retired meanwhile, or `ok` is
        False for a version that another replica has verified.
        """
        report = Probe(ok=ok, reason=reason, replica=self._replica)
        return await self._send(calls.probe(task, version, report))

    async def fetch(self, task: str, version: int, digest: str) -> Artefact:
        """The version's files in `cache_dir/adapters/<digest>/`, downloaded unless there already.

        Raises DigestMismatchError if the files that arrive are not those of `digest`, NotFoundError,
        StoredFilesDamagedError.
        """
        found = await self._cache.find(digest)
        if found is not None:
            return found
        record = await self.version(task, version)
        with self._cache.stage() as staged:
            for file in record.files:
                path = f"{calls.version_path(task, version)}/files/{file.name}"
                await self._download(path, self._cache.target(staged, file.name))
            return await self._cache.keep(staged, digest, record.name)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[M]) -> M:
        return call.read(await self._exchange(call))

    async def _exchange(self, call: Call[M]) -> httpx.Response:
        with _reaching(self._url):
            return await self._http.request(
                call.method,
                call.path,
                params=call.params,
                json=call.json,
                timeout=self._timeout + call.wait,
            )

    async def _download(self, path: str, target: Path) -> None:
        with _reaching(self._url):
            async with self._http.stream("GET", path) as response:
                if not response.is_success:
                    await response.aread()
                    calls.check(response)
                with await asyncio.to_thread(target.open, "wb") as file:
                    async for piece in response.aiter_bytes(_PIECE_BYTES):
                        await asyncio.to_thread(file.write, piece)


class RegistryClient:
    """For operators' programs."""

    def __init__(self, url: str, *, timeout: float = 10.0) -> None:
        self._url = url
        self._timeout = timeout
        self._http = httpx.Client(base_url=url, timeout=timeout, trust_env=not _on_loopback(url))

    def push(self, task: str, files: Sequence[tuple[str, IO[bytes]]]) -> Pushed:
        """Uploads (name, opened file) pairs as a version. Raises AdapterRefusedError, UploadTooLargeError."""
        path = f"/v1/tasks/{check_task(task)}/versions"
        with _reaching(self._url):
            parts = [("files", (name, file)) for name, file in files]
            response = self._http.post(path, files=parts, timeout=httpx.Timeout(self._timeout, read=120.0))
        return Call("POST", path, Pushed).read(response)

    def state(self) -> RoutingState:
        return self._send(calls.state())

    def changes(self, after: int, wait: float = DEFAULT_WAIT) -> RoutingState | None:
        """As `AsyncRegistryClient.changes`, but without being counted as a replica."""
        call = calls.changes(after, wait, "")
        response = self._exchange(call)
        return None if response.status_code == httpx.codes.NO_CONTENT else call.read(response)

    def replicas(self) -> ReplicaList:
        """The prefill replicas that follow this registry."""
        return self._send(calls.replicas())

    def task(self, task: str) -> TaskRoute:
        """Raises TaskNotFoundError."""
        return self._send(calls.task(task))

    def version(self, task: str, version: int) -> VersionRecord:
        """Raises TaskNotFoundError, VersionNotFoundError."""
        return self._send(calls.version(task, version))

    def promote(self, task: str, version: int) -> VersionRecord:
        """Raises NotFoundError, IllegalTransitionError."""
        return self._send(calls.promote(task, version))

    def retire(self, task: str, version: int, *, force: bool = False) -> VersionRecord:
        """Raises NotFoundError, CurrentVersionInUseError."""
        return self._send(calls.retire(task, version, force=force))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[M]) -> M:
        return call.read(self._exchange(call))

    def _exchange(self, call: Call[M]) -> httpx.Response:
        with _reaching(self._url):
            return self._http.request(
                call.method,
                call.path,
                params=call.params,
                json=call.json,
                timeout=self._timeout + call.wait,
            )


def _on_loopback(url: str) -> bool:
    """A proxy from the environment cannot reach this machine's own ports. Raises RegistryUnreachableError."""
    with _reaching(url):
        return httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.TransportError, httpx.InvalidURL) as error:
        detail = str(error) or type(error).__name__
        raise RegistryUnreachableError(f"no adapter registry answers at {url}: {detail}") from error
