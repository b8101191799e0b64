"""How others reach the registry: `AsyncRegistryClient` in prefill services, `RegistryClient` in the CLI.

A prefill service reads `state()`, then waits in `changes(after=revision)`; what is new it fetches, probes and
reports. Both clients raise the errors of `errors.py`: what the server refused as the same class, and
RegistryUnreachableError where no registry answers.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from adapter_registry import arrivals, client_calls
from adapter_registry.cache import DEFAULT_CACHE_BYTES, AdapterCache
from adapter_registry.client_calls import Call, Progress
from adapter_registry.errors import RegistryUnreachableError
from adapter_registry.keys import ChangedKey, KeyRecord, NewKey
from adapter_registry.messages import (
    AuditLog,
    Probe,
    Pushed,
    PushFrom,
    ReplicaList,
    Rerouted,
    RoutingState,
    ShadowTraffic,
    TaskHistory,
    TaskRoute,
    TrafficReport,
    VersionRecord,
    VersionTraffic,
    Warmed,
)
from adapter_registry.names import check_task
from adapter_registry.tensor_files import files_of
from prad.artefact import AdapterRecord, Artefact
from prad.http.asking import direct

M = TypeVar("M", bound=BaseModel)

DEFAULT_WAIT = 20.0
"""Seconds that a request for changes waits at the server."""

_UPLOAD_SECONDS, _FETCH_SECONDS = 120.0, 3600.0
"""That the registry may take to check an upload, and to fetch what is named; it has bounds of its own."""

_PIECE_BYTES = 1 << 20  # of a download that are written at once
_REASON_CHARACTERS = 1000  # why a version failed: its files may be quoted, and a report has to be small


class AsyncRegistryClient:
    """For prefill services. `replica` names this one to operators; fetched adapters stay in `cache_dir`.

    `cache_bytes`: for those that nobody uses; `secret`: what the registry knows its replicas by, if it does.
    """

    def __init__(
        self,
        url: str,
        *,
        cache_dir: Path,
        replica: str,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        secret: str = "",
        timeout: float = 10.0,
    ) -> None:
        self._url = url
        self._timeout = timeout
        self._replica = replica
        self._cache = AdapterCache(cache_dir, cache_bytes)
        self.away: str | None = None
        """Why the registry could not be reached, if that was so the last time."""
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=timeout,
            headers=_bearer(secret),
            **_direct(url),
        )

    async def state(self) -> RoutingState:
        """The whole routing state, now."""
        return await self._send(client_calls.state())

    async def changes(
        self,
        after: int,
        wait: float = DEFAULT_WAIT,
        *,
        mark: str = "",
        progress: Progress | None = None,
    ) -> RoutingState | None:
        """The state as soon as its revision is not `after`; None if it still is after `wait` seconds.

        With the `mark` of the state at `after`, only what changed since, if the registry knows that (see
        `RoutingState.since`). Tells operators of the `progress` here (None: new requests are routed by
        `after`), so ask only once that is true. The server may answer sooner than `wait`, also with None.
        Raises TooManyWaitersError, NotAReplicaError.
        """
        call = client_calls.changes(after, wait, self._replica, progress or Progress(after), mark)
        response = await self._exchange(call)
        return None if response.status_code == httpx.codes.NO_CONTENT else call.read(response)

    async def version(self, task: str, version: int) -> VersionRecord:
        """Everything about one version. Raises NotFoundError."""
        return await self._send(client_calls.version(task, version))

    async def probe(self, task: str, version: int, *, ok: bool, reason: str = "") -> VersionRecord:
        """Reports a probe.

        Raises NotFoundError, NotAReplicaError, and IllegalTransitionError if the version was retired
        meanwhile, or `ok` is False for a version that another replica has verified.
        """
        report = Probe(ok=ok, reason=reason[:_REASON_CHARACTERS], replica=self._replica)
        return await self._send(client_calls.probe(task, version, report))

    async def traffic(
        self, versions: Sequence[VersionTraffic], shadows: Sequence[ShadowTraffic] = ()
    ) -> None:
        """Reports what was answered here, at most `MOST_SERIES` of each. Raises NotAReplicaError."""
        report = TrafficReport(versions=tuple(versions), shadows=tuple(shadows))
        client_calls.check(await self._exchange(client_calls.traffic(report)))

    async def fetch(self, task: str, version: int, digest: str) -> Artefact:
        """The version's files in `cache_dir/adapters/<digest>/`, downloaded unless there already.

        They stay there at least as long as the returned artefact is referred to.
        Raises DigestMismatchError if the files that arrive are not those of `digest`, NotFoundError,
        StoredFilesDamagedError.
        """
        found = await self._cache.find(digest)
        if found is not None:
            return found
        record = await self.version(task, version)
        patience = client_calls.patience(self._timeout, record)
        async with self._cache.stage() as staged:
            for file in record.files:
                path = client_calls.file_path(task, version, file.name)
                await self._download(path, arrivals.place(staged, file.name), patience)
            return await self._cache.keep(staged, digest, record.name)

    async def tidy(self) -> None:
        """Removes adapters on disk that nobody uses, beyond `cache_bytes`, and what dead processes left."""
        await self._cache.sweep()

    async def close(self) -> None:
        await self._http.aclose()
        await self._cache.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call[M]) -> M:
        return call.read(await self._exchange(call))

    async def _exchange(self, call: Call[M]) -> httpx.Response:
        try:
            with _reaching(self._url):
                response = await self._http.request(
                    call.method,
                    call.path,
                    params=call.params,
                    json=call.json,
                    headers=call.headers,
                    timeout=self._timeout + call.wait,
                )
        except RegistryUnreachableError as error:
            self.away = error.message
            raise
        self.away = None
        return response

    async def _download(self, path: str, target: Path, patience: httpx.Timeout) -> None:
        with _reaching(self._url):
            async with self._http.stream("GET", path, timeout=patience) as response:
                if not response.is_success:
                    await response.aread()
                    client_calls.check(response)
                with await asyncio.to_thread(target.open, "wb") as file:
                    async for piece in response.aiter_bytes(_PIECE_BYTES):
                        await asyncio.to_thread(file.write, piece)


class RegistryClient:
    """For operators' programs. `operator`: who changes something, for the history; nobody checks it. `token`:
    one whose role is enough; where the registry asks for one, calls raise UnauthorizedError without, or
    RoleTooLowError."""

    def __init__(self, url: str, *, timeout: float = 10.0, operator: str = "", token: str = "") -> None:
        self._url = url
        self._timeout = timeout
        headers = {"x-prad-operator": operator.encode("ascii", "replace").decode()} if operator else {}
        headers |= _bearer(token)
        self._http = httpx.Client(base_url=url, timeout=timeout, headers=headers, **_direct(url))

    def push(self, task: str, files: Sequence[tuple[str, IO[bytes]]], *, ready_within: float = 0.0) -> Pushed:
        """Uploads (name, opened file) pairs as a version.

        `ready_within`: seconds to wait until it is verified and ready at all connected replicas; the answer's
        `state`, `reason` and `pending` say how far that is. Raises AdapterRefusedError, UploadTooLargeError.
        """
        parts = [("files", (name, file)) for name, file in files]
        return self._push(task, ready_within, _UPLOAD_SECONDS, files=parts)

    def push_tensors(
        self, task: str, record: AdapterRecord, tensors: Mapping[str, Any], *, ready_within: float = 0.0
    ) -> Pushed:
        """Pushes what is in memory, in one request and without files: `tensors` of torch or numpy by their
        names in an artefact, `record` as its prad.json. As `push` otherwise."""
        return self.push(task, files_of(record, tensors), ready_within=ready_within)

    def push_uri(self, task: str, uri: str, *, ready_within: float = 0.0) -> Pushed:
        """Has the registry fetch an adapter (file://, hf://, s3://, oci://), from where its operator allows.

        As `push`; raises SourceNotAllowedError, SourceUnavailableError, MissingExtraError besides.
        """
        body = PushFrom(uri=uri).model_dump(mode="json", exclude_defaults=True)
        return self._push(task, ready_within, _FETCH_SECONDS, json=body)

    def _push(self, task: str, ready_within: float, seconds: float, **body: Any) -> Pushed:
        path = f"/v1/tasks/{check_task(task)}/versions"
        params: dict[str, str | float] = {"wait": "ready", "seconds": ready_within} if ready_within else {}
        patience = httpx.Timeout(self._timeout, read=seconds + ready_within)
        with _reaching(self._url):
            response = self._http.post(path, params=params, timeout=patience, **body)
        return Call("POST", path, Pushed).read(response)

    def state(self) -> RoutingState:
        return self._send(client_calls.state())

    def tasks(self, *, everything: bool = False) -> RoutingState:
        """As `state`, but without failed and deleted versions unless `everything` is asked for."""
        return self._send(client_calls.tasks(everything=everything))

    def changes(self, after: int, wait: float = DEFAULT_WAIT) -> RoutingState | None:
        """As `AsyncRegistryClient.changes`, but without being counted as a replica."""
        call = client_calls.changes(after, wait, "", Progress(after))
        response = self._exchange(call)
        return None if response.status_code == httpx.codes.NO_CONTENT else call.read(response)

    def replicas(self, revision: int = 0, wait: float = 0.0) -> ReplicaList:
        """The prefill replicas that follow this registry.

        Waits up to `wait` seconds until `revision` is in force at all connected ones.
        """
        return self._send(client_calls.replicas(revision, wait))

    def task(self, task: str) -> TaskRoute:
        """Raises TaskNotFoundError."""
        return self._send(client_calls.task(task))

    def log(self, latest: int = 100) -> AuditLog:
        """The `latest` changes of all tasks."""
        return self._send(client_calls.log(latest))

    def history(self, task: str, latest: int = 100) -> TaskHistory:
        """The task's latest changes. Raises TaskNotFoundError."""
        return self._send(client_calls.history(task, latest))

    def version(self, task: str, version: int) -> VersionRecord:
        """Raises TaskNotFoundError, VersionNotFoundError."""
        return self._send(client_calls.version(task, version))

    def promote(self, task: str, version: int, *, seen: int | None = None) -> Rerouted:
        """`seen`: the revision of the task's routing by which this was decided; None: whatever it is.

        Raises RoutingChangedError if it is another now, NotFoundError, IllegalTransitionError.
        """
        return self._send(client_calls.promote(task, version, seen))

    def retire(self, task: str, version: int, *, force: bool = False, seen: int | None = None) -> Rerouted:
        """`seen`: as in `promote`. Raises RoutingChangedError, NotFoundError, VersionRoutedError."""
        return self._send(client_calls.retire(task, version, force=force, seen=seen))

    def split(self, task: str, weights: Mapping[int, int], *, seen: int | None = None) -> Rerouted:
        """Divides requests for plain `task` by weight. Raises what `promote` raises."""
        return self._send(client_calls.split(task, weights, seen))

    def alias(self, task: str, name: str, version: int | None, *, seen: int | None = None) -> Rerouted:
        """`task@name` means the version; None: nothing any more. Raises what `promote` raises."""
        return self._send(client_calls.alias(task, name, version, seen))

    def shadow(self, task: str, shares: Mapping[int, float], *, seen: int | None = None) -> Rerouted:
        """Requests for plain `task` also run under these versions, unseen; none: no more. `shares`: percents.

        Raises what `promote` raises.
        """
        return self._send(client_calls.shadow(task, shares, seen))

    def rollback(self, task: str, *, seen: int | None = None) -> Rerouted:
        """The routing before is in force again. Raises RoutingChangedError, NoRoutingBeforeError."""
        return self._send(client_calls.rollback(task, seen))

    def warm(self, task: str, version: int) -> Warmed:
        """All connected replicas load the version into memory; how far they are. Raises NotFoundError,
        IllegalTransitionError."""
        return self._send(client_calls.warm(task, version))

    def unretire(self, task: str, version: int) -> VersionRecord:
        """Brings a retired version back, to be probed. Raises NotFoundError, IllegalTransitionError."""
        return self._send(client_calls.unretire(task, version))

    def delete(self, task: str, version: int) -> VersionRecord:
        """Removes the version's files. Raises NotFoundError, IllegalTransitionError while it answers."""
        return self._send(client_calls.delete(task, version))

    def keys(self) -> tuple[KeyRecord, ...]:
        """All there ever were."""
        return self._send(client_calls.keys()).keys

    def create_key(self, new: NewKey) -> ChangedKey:
        """A new key, with its token, which nobody tells again. Raises KeyExistsError, WouldLockOutError."""
        return self._send(client_calls.create_key(new))

    def revoke_key(self, name: str) -> ChangedKey:
        """The key, revoked. Raises KeyNotFoundError, WouldLockOutError."""
        return self._send(client_calls.revoke_key(name))

    def pull(self, task: str, version: int, folder: Path) -> VersionRecord:
        """Downloads the version's files into `folder`, which must be new or empty, all of them or none; and
        who signed them, if somebody did.

        Raises NotFoundError, StoredFilesDamagedError, DigestMismatchError if what arrives is not what was
        pushed, FolderInUseError, OSError.
        """
        record = self.version(task, version)
        patience = client_calls.patience(self._timeout, record)
        with arrivals.new_folder(folder) as staged:
            for file in record.files:
                path = client_calls.file_path(task, version, file.name)
                self._download(path, arrivals.place(staged, file.name), patience)
            arrivals.read(staged, record.digest, record.name)
            arrivals.place_signatures(staged, record)
        return record

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _download(self, path: str, target: Path, patience: httpx.Timeout) -> None:
        with _reaching(self._url), self._http.stream("GET", path, timeout=patience) as response:
            if not response.is_success:
                response.read()
                client_calls.check(response)
            with target.open("wb") as file:
                for piece in response.iter_bytes(_PIECE_BYTES):
                    file.write(piece)

    def _send(self, call: Call[M]) -> M:
        return call.read(self._exchange(call))

    def _exchange(self, call: Call[M]) -> httpx.Response:
        with _reaching(self._url):
            return self._http.request(
                call.method,
                call.path,
                params=call.params,
                json=call.json,
                headers=call.headers,
                timeout=self._timeout + call.wait,
            )


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def _direct(url: str) -> dict[str, Any]:
    """Raises RegistryUnreachableError."""
    with _reaching(url):
        return direct(url)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.TransportError, httpx.InvalidURL) as error:
        detail = str(error) or type(error).__name__
        raise RegistryUnreachableError(f"no adapter registry answers at {url}: {detail}") from error
