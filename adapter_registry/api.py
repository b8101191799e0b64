"""What travels over the registry's HTTP API: shared by server and client. All times are UTC, ISO 8601."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from adapter_registry.versions import Event, State
from prad.artefact import AdapterRecord, BaseModelRef

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal; also the name of a folder, so nothing else may pass."""


class _Answer(BaseModel):
    """Unknown fields are ignored, so that an older client reads a newer registry."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Command(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PushPath(_Command):
    """Push from a folder on the registry's machine."""

    path: str
    """The folder; taken if the registry allows local paths."""


class Retire(_Command):
    """Take a version out of service."""

    force: bool = False
    """Also the current version; the latest other one that can answer takes over."""


class Probe(_Command):
    """A prefill replica's report on one version: loaded onto its model, one forward run."""

    ok: bool
    """Whether it loaded and ran."""
    reason: str = ""
    """Why not."""
    replica: str = ""
    """Who reports."""


class StoredFile(_Answer):
    name: str
    size: int


class VersionRoute(_Answer):
    """One version, as routing needs it."""

    version: int
    state: State
    digest: Digest
    method: str
    base: BaseModelRef
    pushed_at: str


class TaskRoute(_Answer):
    """`current` is what a plain `task` means; None: the task cannot answer.

    `routing_revision`: of the last change that promoted or retired one of its versions; what If-Match takes.
    """

    task: str
    current: int | None
    routing_revision: int = 0
    versions: tuple[VersionRoute, ...]


class RoutingState(_Answer):
    """Everything routing needs, at one revision."""

    revision: int
    tasks: tuple[TaskRoute, ...]

    def listed(self) -> "RoutingState":
        """Without failed and deleted versions, and tasks that have no others."""
        tasks = (
            task.model_copy(update={"versions": tuple(v for v in task.versions if v.state.listed)})
            for task in self.tasks
        )
        return self.model_copy(update={"tasks": tuple(task for task in tasks if task.versions)})


class HistoryLine(_Answer):
    revision: int
    event: Event
    before: State | None
    after: State
    current: int | None
    at: str
    replica: str
    reason: str


class VersionRecord(_Answer):
    """Everything about one version. `reason` says why a probe failed; `current`: plain `task` means it."""

    task: str
    version: int
    state: State
    current: bool
    digest: Digest
    reason: str
    pushed_at: str
    record: AdapterRecord
    files: tuple[StoredFile, ...]
    tensors: int
    tensor_bytes: int
    history: tuple[HistoryLine, ...]

    @property
    def name(self) -> str:
        return f"{self.task}@{self.version}"


class Pushed(VersionRecord):
    """The answer to a push. `created` False: these very files were a version already."""

    created: bool


class Rerouted(VersionRecord):
    """The answer to promote and retire. `replicas`: the revision in force at each connected prefill replica.

    `pending`: those of them that have not put the change in force yet, and still route by an earlier one.
    `routing_revision`: the task's, afterwards.
    """

    routing_revision: int = 0
    replicas: dict[str, int] = Field(examples=[{"prefill-a": 41, "prefill-b": 39}])
    pending: tuple[str, ...] = Field(examples=[["prefill-b"]])


class Replica(_Answer):
    """A prefill replica that follows the changes. `connected`: it waits now, or did a moment ago.

    `revision`: the one in force there; None if it has not asked for changes yet.
    """

    name: str
    connected: bool
    revision: int | None = None
    last_seen: str


class ReplicaList(_Answer):
    """`pending`: the connected ones where the revision that was asked for is not in force yet."""

    replicas: tuple[Replica, ...]
    pending: tuple[str, ...] = ()


class ServerVersion(_Answer):
    version: str
    api: str = "v1"
    max_upload_bytes: int


class ErrorBody(_Answer):
    """The shape that OpenAI's API gives its errors."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(_Answer):
    error: ErrorBody
