"""What travels over the registry's HTTP API: shared by server and client. All times are UTC, ISO 8601."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, computed_field, model_validator

from adapter_registry.keys import StoredKey
from adapter_registry.routing import Routing, Shares, Weights
from adapter_registry.versions import Event, State
from prad.artefact import AdapterRecord, BaseModelRef
from prad.artefact.signatures import Signature

TaskName = Annotated[str, Field(examples=["support"])]
Number = Annotated[int, Field(examples=[2])]
Revision = Annotated[int, Field(examples=[41])]
Time = Annotated[str, Field(examples=["2026-11-29T08:00:00.123456Z"])]
Reason = Annotated[str, Field(examples=["with this adapter the logits are not finite"])]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$"), Field(examples=["5e1c" * 16])]
"""SHA-256 in hexadecimal; also the name of a folder, so nothing else may pass."""


class _Answer(BaseModel):
    """Unknown fields are ignored, so that an older client reads a newer registry."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Command(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PushFrom(_Command):
    """Push what the registry fetches itself, from where its operator allows: one of the two."""

    uri: str = Field("", examples=["oci://ghcr.io/my-org/support:1"])
    """A folder (file://), a model repository of the hub (hf://), a folder of a bucket (s3://) or an artefact
    of an OCI registry (oci://)."""
    path: str = ""
    """A folder on the registry's machine."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.uri) is bool(self.path):
            raise ValueError("either uri or path must be given")
        return self


class Retire(_Command):
    """Take a version out of service."""

    force: bool = False
    """Also one that plain `task` or an alias means: the others in the split take over, or the latest routable
    version, and the alias is gone."""


class Weighted(_Command):
    """Divide requests for plain `task`."""

    weights: Weights = Field(examples=[{"1": 90, "2": 10}])
    """Versions, each with its weight, a whole number; a request's sticky key draws one of them."""


class Shadowed(_Command):
    """Let requests for plain `task` also run under other versions, unseen by whoever asks."""

    shares: Shares = Field(examples=[{"2": 5}])
    """Versions, each with its share of the requests in percent, together at most 100; empty: no more."""


class Aliased(_Command):
    """Let an alias mean a version."""

    version: Annotated[int, Field(ge=1, le=2**31)] = Field(examples=[2])
    """The version."""


class Probe(_Command):
    """A prefill replica's report on one version: loaded onto its model, one forward run."""

    ok: bool
    """Whether it loaded and ran."""
    reason: str = ""
    """Why not."""
    replica: str = ""
    """Who reports."""


TIMES = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0),
)
"""Seconds up to which `Times` count, each from the one before; what took longer than the last comes last."""

Count = Annotated[int, Field(ge=0, le=2**53)]
Times = Annotated[tuple[Count, ...], Field(min_length=len(TIMES) + 1, max_length=len(TIMES) + 1)]
TaskLabel = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]{0,64}$")]


def no_times() -> list[int]:
    return [0] * (len(TIMES) + 1)


MOST_SERIES = 50
"""Versions in one report: more come in several."""


class VersionTraffic(_Command):
    """What a version answered since the report before."""

    task: TaskLabel
    """Empty: the plain model."""
    version: Annotated[int, Field(ge=0, le=2**31)]
    """0: the plain model."""
    requests: Count
    """That ended."""
    failed: Count
    """Of these, the ones that were not answered; whose client went away are none of them."""
    tokens: Count
    """Of outputs."""
    first_token: Times
    """From a request's head to its first token."""
    duration: Times
    """From its head to its end."""


class ShadowTraffic(_Command):
    """What became of requests that ran under a shadow, too, since the report before."""

    task: TaskLabel
    version: Annotated[int, Field(ge=1, le=2**31)]
    """That answered."""
    shadow: Annotated[int, Field(ge=1, le=2**31)]
    """That answered nobody."""
    compared: Count
    """Greedy answers of both."""
    equal: Count
    """Of these, those with equal tokens."""
    tokens: Count
    """Of the answers that were compared."""
    equal_tokens: Count
    """Of these, equal ones up to the first difference."""
    dropped: Count
    """That live traffic, or something else, was in the way of."""
    live_first: Times
    """From the engine's start to the first token, of the version that answered."""
    shadow_first: Times
    """And of the shadow."""


class TrafficReport(_Command):
    """What a prefill replica answered since the report before."""

    versions: Annotated[tuple[VersionTraffic, ...], Field(max_length=MOST_SERIES)] = ()
    shadows: Annotated[tuple[ShadowTraffic, ...], Field(max_length=MOST_SERIES)] = ()


class StoredFile(_Answer):
    name: str = Field(examples=["adapter_model.safetensors"])
    size: int = Field(examples=[1_114_608])


class SignedBy(Signature):
    """A signature over a version's digest. `name`: by which the registry knew the key when it was pushed,
    of its own list of keys; empty: it had none."""

    name: str = ""

    @property
    def who(self) -> str:
        """For people."""
        return f"{self.name} ({self.fingerprint})" if self.name else self.fingerprint


class VersionRoute(_Answer):
    """One version, as routing needs it."""

    version: Number
    state: State
    digest: Digest
    method: str = Field(examples=["prad-pa"])
    base: BaseModelRef
    pushed_at: Time
    warmed: int = 0
    """Revision of the last request to load it into memory; 0: there was none."""


class TaskRoute(_Answer):
    """A task: what its names mean, and its versions."""

    task: TaskName
    routing: Routing
    versions: tuple[VersionRoute, ...]


class RoutingState(_Answer):
    """Everything routing needs, at one revision; `keys`: all API keys, told to prefill services alone; None:
    not told.

    `mark`: of the last change, by which a replica shows that it knows that one, and is then told only what
    changed since. `since`: the revision that this goes on from: `tasks` are those that changed since, and
    `same_keys` says that no key did; None: this is all.
    """

    revision: Revision
    tasks: tuple[TaskRoute, ...]
    keys: tuple[StoredKey, ...] | None = ()
    mark: str = ""
    since: int | None = None
    same_keys: bool = False

    def unchanged(self) -> "RoutingState":
        """What is told of it while nothing changes."""
        none = {"tasks": (), "keys": None, "since": self.revision, "same_keys": True}
        return self.model_copy(update=none)

    def on(self, known: "RoutingState") -> "RoutingState":
        """All there is, where `known` is all there was at the revision that this goes on from."""
        if self.since is None:
            return self
        tasks = {task.task: task for task in (*known.tasks, *self.tasks)}
        update = {
            "tasks": tuple(tasks[name] for name in sorted(tasks)),
            "keys": known.keys if self.same_keys else self.keys,
            "since": None,
            "same_keys": False,
        }
        return self.model_copy(update=update)

    def listed(self) -> "RoutingState":
        """Without failed and deleted versions, and tasks that have no others."""
        tasks = (
            task.model_copy(update={"versions": tuple(v for v in task.versions if v.state.listed)})
            for task in self.tasks
        )
        return self.model_copy(update={"tasks": tuple(task for task in tasks if task.versions)})

    def page(self, after: str, limit: int | None) -> "TaskPage":
        """So many tasks whose names come after `after`; keys are not told."""
        tasks = sorted((task for task in self.tasks if task.task > after), key=lambda task: task.task)
        some = tuple(tasks[:limit])
        more = some[-1].task if len(some) < len(tasks) else ""
        return TaskPage(revision=self.revision, tasks=some, keys=None, next=more)


class TaskPage(RoutingState):
    """Some of the tasks, by name. `next`: the `after` of the next page; empty: this is the last."""

    next: str = ""


class HistoryLine(_Answer):
    """One change. `version`: whose state went from `before` to `after`; None: the change was of none.

    `routing`: what it made of the task's; None: that stayed as it was. `by`: a replica, or an operator as
    that one calls itself, or is reached at.
    """

    revision: Revision
    version: Number | None
    event: Event
    before: State | None
    after: State | None
    routing: Routing | None
    at: Time
    by: str = Field(examples=["ada@desk"])
    reason: Reason


class LoggedLine(HistoryLine):
    """The same, of one of all tasks."""

    task: TaskName


class AuditLog(_Answer):
    """The latest changes of all tasks, the latest last."""

    events: tuple[LoggedLine, ...]


class TaskHistory(_Answer):
    """The latest changes of a task, the latest last."""

    task: TaskName
    events: tuple[HistoryLine, ...]


class VersionRecord(_Answer):
    """Everything about one version. `reason` says why a probe failed; `current`: plain `task` means it, or is
    divided between it and others; `signatures`: of all who signed these files."""

    task: TaskName
    version: Number
    state: State
    current: bool
    digest: Digest
    reason: Reason
    pushed_at: Time
    record: AdapterRecord
    files: tuple[StoredFile, ...]
    tensors: int = Field(examples=[60])
    tensor_bytes: int = Field(examples=[1_105_920])
    signatures: tuple[SignedBy, ...] = ()
    history: tuple[HistoryLine, ...]

    @property
    def name(self) -> str:
        return f"{self.task}@{self.version}"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def source(self) -> str:
        """Where the registry fetched the files, with revision or digest; empty: they came with the push."""
        pushes = (line.reason for line in self.history if line.event is Event.PUSH)
        return next(pushes, "")

    @property
    def warmed(self) -> int:
        """See `VersionRoute.warmed`."""
        return max((line.revision for line in self.history if line.event is Event.WARM), default=0)


class Pushed(VersionRecord):
    """The answer to a push. `created` False: these very files were a version already.

    `pending`: if it was to wait, the connected prefill replicas where the version is not ready yet.
    """

    created: bool
    pending: tuple[str, ...] = Field((), examples=[["prefill-b"]])


class Rerouted(TaskRoute):
    """The answer to whatever changes a routing: the task as it is now.

    `replicas`: the revision in force at each connected prefill replica; `pending`: those of them that have
    not put the change in force yet, and still route by an earlier one.
    """

    replicas: dict[str, int] = Field(examples=[{"prefill-a": 41, "prefill-b": 39}])
    pending: tuple[str, ...] = Field(examples=[["prefill-b"]])


class ReplicaState(StrEnum):
    """How far a replica is with the registry's latest revision."""

    ANNOUNCED = "announced"
    """It follows, and has not been told yet."""
    LOADING = "loading"
    """It was told, and fetches or probes what that names; or it routes by it, and adapters are under way."""
    READY = "ready"
    """It routes new requests by it, and every adapter is there."""
    FAILED = "failed"
    """It cannot have something that is named: `troubles` say what, and why; it goes on with what it has."""
    AWAY = "away"
    """It has not asked for a while."""


class Replica(_Answer):
    """A prefill replica that follows the changes. `connected`: it waits now, or did a moment ago.

    `revision`: the one in force there; None if it has not asked for changes yet. `fetching`: adapters that
    are still on their way there; one that a request names comes first.
    """

    name: str = Field(examples=["prefill-a"])
    connected: bool
    state: ReplicaState
    revision: Revision | None = None
    fetching: int = 0
    troubles: tuple[str, ...] = ()
    last_seen: Time


class ReplicaList(_Answer):
    """`pending`: the connected ones where the revision that was asked for is not in force yet, or adapters
    are still on their way."""

    replicas: tuple[Replica, ...]
    pending: tuple[str, ...] = ()


class Warmed(_Answer):
    """Where a version is in memory now, of the connected prefill replicas. `failed`: where not, and why;
    `pending`: where it is not known yet."""

    task: TaskName
    version: Number
    ready: tuple[str, ...] = Field(examples=[["prefill-a"]])
    failed: dict[str, str] = Field(examples=[{"prefill-b": "there was no room in memory within 4 s"}])
    pending: tuple[str, ...] = Field(examples=[["prefill-c"]])


class ServerVersion(_Answer):
    version: str = Field(examples=["0.4.0"])
    api: str = "v1"
    max_upload_bytes: int = Field(examples=[512 << 20])
