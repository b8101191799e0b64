"""The registry's requests as data: written once, sent by both clients of `client.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from adapter_registry import errors
from adapter_registry.errors import ErrorReply
from adapter_registry.keys import ChangedKey, KeyList, NewKey
from adapter_registry.messages import (
    Aliased,
    AuditLog,
    Probe,
    ReplicaList,
    Rerouted,
    Retire,
    RoutingState,
    Shadowed,
    TaskHistory,
    TaskRoute,
    TrafficReport,
    VersionRecord,
    Warmed,
    Weighted,
)
from adapter_registry.names import check_alias, check_task

M = TypeVar("M", bound=BaseModel)

LONGEST_WAIT = 60.0
"""Seconds that the registry may wait for replicas before it answers a change; its settings allow no more."""
BUCKET_SECONDS = 10.0
"""That the registry's bucket, if it has one, may take to answer a call."""
LEAST_BYTES_PER_S = 1 << 20
"""At which it sends or takes a file: one that goes slower is given up."""
MOST_TROUBLES, MOST_CHARACTERS = 8, 300
"""That a replica tells, of what it cannot have."""
UNTOLD = "more did not come into memory: "
"""How the trouble begins that stands for versions that somebody wanted in memory, beyond what is told."""


@dataclass(frozen=True, slots=True)
class Call(Generic[M]):
    """One request, and the type of its answer. `wait` is how long the server may take on purpose.

    `seen`: the revision that the task's routing must have for it; None: any.
    """

    method: str
    path: str
    answer: type[M]
    params: dict[str, Any] = field(default_factory=dict)
    body: BaseModel | None = None
    wait: float = 0.0
    seen: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.seen is None else {"if-match": f'"{self.seen}"'}

    @property
    def json(self) -> Any:
        return None if self.body is None else self.body.model_dump(mode="json")

    def read(self, response: httpx.Response) -> M:
        """Raises the error that the server named, RegistryUnreachableError if the answer is no registry's."""
        check(response)
        try:
            return self.answer.model_validate_json(response.content)
        except ValidationError as error:
            raise _not_a_registry(response) from error


def check(response: httpx.Response) -> None:
    """Raises what the server refused, as the same class that the server raised."""
    if response.is_success:
        return
    try:
        body = ErrorReply.model_validate_json(response.content).error
    except ValidationError as error:
        raise _not_a_registry(response) from error
    kinds = {kind.code: kind for kind in _kinds(errors.RegistryError)}
    raise kinds.get(body.code or "", errors.RegistryError)(body.message, param=body.param)


def version_path(task: str, version: int) -> str:
    return f"/v1/tasks/{check_task(task)}/versions/{version}"


def file_path(task: str, version: int, name: str) -> str:
    return f"{version_path(task, version)}/files/{name}"


def seconds_for(nbytes: int) -> float:
    """That a file of so many bytes may take from the registry's bucket, or to it."""
    return BUCKET_SECONDS + nbytes / LEAST_BYTES_PER_S


def patience(seconds: float, record: VersionRecord) -> httpx.Timeout:
    """Of who asks for one of the version's files. Before it answers the registry may have to find all of them
    in a bucket, and to fetch them: one that is slow at that is not away. `seconds`: beyond that."""
    fetched = seconds_for(0) + sum(seconds_for(file.size) for file in record.files)
    return httpx.Timeout(seconds, read=seconds + fetched)


def state() -> Call[RoutingState]:
    return Call("GET", "/v1/state", RoutingState)


def tasks(*, everything: bool) -> Call[RoutingState]:
    return Call("GET", "/v1/tasks", RoutingState, {"all": everything})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a replica is: the revision by which it routes new requests, adapters that are on their way to
    it, what it cannot have and why."""

    in_force: int
    fetching: int = 0
    troubles: Sequence[str] = ()


def changes(after: int, wait: float, replica: str, progress: Progress, mark: str = "") -> Call[RoutingState]:
    params: dict[str, Any] = {"after": after, "wait": wait, "replica": replica, "mark": mark}
    params |= {"in_force": progress.in_force, "fetching": progress.fetching}
    params["trouble"] = [trouble[:MOST_CHARACTERS] for trouble in progress.troubles[:MOST_TROUBLES]]
    return Call("GET", "/v1/changes", RoutingState, params, wait=wait)


def traffic(report: TrafficReport) -> Call[TrafficReport]:
    """Its answer is empty."""
    return Call("POST", "/v1/traffic", TrafficReport, body=report)


def replicas(revision: int, wait: float) -> Call[ReplicaList]:
    params = {"revision": revision, "wait": wait}
    return Call("GET", "/v1/replicas", ReplicaList, params, wait=wait)


def task(name: str) -> Call[TaskRoute]:
    return Call("GET", f"/v1/tasks/{check_task(name)}", TaskRoute)


def log(latest: int) -> Call[AuditLog]:
    return Call("GET", "/v1/events", AuditLog, {"latest": latest})


def history(name: str, latest: int) -> Call[TaskHistory]:
    return Call("GET", f"/v1/tasks/{check_task(name)}/events", TaskHistory, {"latest": latest})


def version(task: str, number: int) -> Call[VersionRecord]:
    return Call("GET", version_path(task, number), VersionRecord)


def probe(task: str, number: int, report: Probe) -> Call[VersionRecord]:
    return Call("POST", f"{version_path(task, number)}/probe", VersionRecord, body=report)


def promote(task: str, number: int, seen: int | None = None) -> Call[Rerouted]:
    return Call("POST", f"{version_path(task, number)}/promote", Rerouted, wait=LONGEST_WAIT, seen=seen)


def retire(task: str, number: int, *, force: bool, seen: int | None = None) -> Call[Rerouted]:
    path = f"{version_path(task, number)}/retire"
    return Call("POST", path, Rerouted, body=Retire(force=force), wait=LONGEST_WAIT, seen=seen)


def split(task: str, weights: Mapping[int, int], seen: int | None = None) -> Call[Rerouted]:
    body = Weighted(weights=dict(weights))
    return Call(
        "PUT", f"/v1/tasks/{check_task(task)}/split", Rerouted, body=body, wait=LONGEST_WAIT, seen=seen
    )


def alias(task: str, name: str, number: int | None, seen: int | None = None) -> Call[Rerouted]:
    path = f"/v1/tasks/{check_task(task)}/aliases/{check_alias(name)}"
    if number is None:
        return Call("DELETE", path, Rerouted, wait=LONGEST_WAIT, seen=seen)
    return Call("PUT", path, Rerouted, body=Aliased(version=number), wait=LONGEST_WAIT, seen=seen)


def shadow(task: str, shares: Mapping[int, float], seen: int | None = None) -> Call[Rerouted]:
    path, body = f"/v1/tasks/{check_task(task)}/shadow", Shadowed(shares=dict(shares))
    return Call("PUT", path, Rerouted, body=body, wait=LONGEST_WAIT, seen=seen)


def rollback(task: str, seen: int | None = None) -> Call[Rerouted]:
    return Call("POST", f"/v1/tasks/{check_task(task)}/rollback", Rerouted, wait=LONGEST_WAIT, seen=seen)


def warm(task: str, number: int) -> Call[Warmed]:
    return Call("POST", f"{version_path(task, number)}/warm", Warmed, wait=LONGEST_WAIT)


def unretire(task: str, number: int) -> Call[VersionRecord]:
    return Call("POST", f"{version_path(task, number)}/unretire", VersionRecord)


def delete(task: str, number: int) -> Call[VersionRecord]:
    return Call("DELETE", version_path(task, number), VersionRecord)


def keys() -> Call[KeyList]:
    return Call("GET", "/v1/keys", KeyList)


def create_key(new: NewKey) -> Call[ChangedKey]:
    return Call("POST", "/v1/keys", ChangedKey, body=new, wait=LONGEST_WAIT)


def revoke_key(name: str) -> Call[ChangedKey]:
    return Call("DELETE", f"/v1/keys/{quote(name, safe='')}", ChangedKey, wait=LONGEST_WAIT)


def _kinds(kind: type[errors.RegistryError]) -> list[type[errors.RegistryError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _kinds(child))]


def _not_a_registry(response: httpx.Response) -> errors.RegistryUnreachableError:
    return errors.RegistryUnreachableError(
        f"{response.request.url} answered with {response.status_code}, but not as an adapter registry does"
    )
