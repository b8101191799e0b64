"""What the Redis store keeps of a task, a version and an adapter, as JSON; and what a change makes of it."""

from pydantic import BaseModel, ConfigDict

from adapter_registry.messages import (
    HistoryLine,
    SignedBy,
    StoredFile,
    TaskRoute,
    VersionRecord,
    VersionRoute,
)
from adapter_registry.planning import Change, TaskView
from adapter_registry.routing import Routing
from adapter_registry.snapshot import TaskSnapshot
from adapter_registry.sqlite_rows import no_task
from adapter_registry.store import StoredAdapter, all_signatures, history_line
from adapter_registry.versions import Event, State
from prad.artefact import AdapterRecord


class StoredVersion(VersionRoute):
    """`changed`: the revision of its last change."""

    reason: str = ""
    changed: int


class StoredTask(TaskRoute):
    versions: tuple[StoredVersion, ...]

    @property
    def view(self) -> TaskView:
        return TaskView(self.task, self.routing, {v.version: v.state for v in self.versions})

    @classmethod
    def new(cls, task: str) -> "StoredTask":
        return cls(task=task, routing=Routing(), versions=())


class StoredFiles(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    record: AdapterRecord
    files: tuple[StoredFile, ...]
    tensors: int
    tensor_bytes: int
    signatures: tuple[SignedBy, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def with_signatures(adapter: StoredAdapter, text: str | bytes | None) -> StoredFiles:
    """The adapter, with what is known (`text`) of who signed it."""
    known = () if text is None else StoredFiles.model_validate_json(text).signatures
    stored = StoredFiles.model_validate(adapter, from_attributes=True)
    return stored.model_copy(update={"signatures": all_signatures(known, adapter.signatures)})


def read(text: str | bytes | None) -> StoredTask | None:
    return None if text is None else StoredTask.model_validate_json(text)


def there(found: StoredTask | None, task: str) -> StoredTask:
    if found is None:
        raise no_task(task)
    return found


def added(
    known: StoredTask, number: int, adapter: StoredAdapter, revision: int, at: str, by: str, source: str
) -> tuple[StoredTask, list[HistoryLine]]:
    """The task with one more version."""
    version = StoredVersion(
        version=number,
        state=State.PUSHED,
        digest=adapter.digest,
        method=adapter.record.method,
        base=adapter.record.base,
        pushed_at=at,
        changed=revision,
    )
    change = Change(number, Event.PUSH, None, State.PUSHED)
    task = known.model_copy(update={"versions": (*known.versions, version)})
    return task, [history_line(change, revision, at=at, by=by, reason=source)]


def moved(
    known: StoredTask, changes: tuple[Change, ...], revision: int, *, at: str, by: str, reason: str = ""
) -> tuple[StoredTask, list[HistoryLine]]:
    """The task after `changes`, the first of which is the one after `revision`."""
    lines = []
    for number, change in enumerate(changes, start=revision + 1):
        line = history_line(change, number, at=at, by=by, reason=reason)
        known = _after(known, line)
        lines.append(line)
    return known, lines


def _after(known: StoredTask, line: HistoryLine) -> StoredTask:
    def changed(version: StoredVersion) -> StoredVersion:
        # what is deleted goes on saying why it had failed; that of a push is where the files were fetched
        said = "" if line.event is Event.PUSH else line.reason
        why = version.reason if line.event is Event.DELETE else said
        warmed = line.revision if line.event is Event.WARM else version.warmed
        update = {"state": line.after, "reason": why, "changed": line.revision, "warmed": warmed}
        return version.model_copy(update=update)

    versions = tuple(changed(v) if v.version == line.version else v for v in known.versions)
    return known.model_copy(update={"versions": versions, "routing": line.routing or known.routing})


def record(task: StoredTask, version: StoredVersion, adapter: StoredFiles, lines: list[str]) -> VersionRecord:
    return VersionRecord(
        task=task.task,
        version=version.version,
        state=version.state,
        current=version.version in task.routing.split,
        digest=version.digest,
        reason=version.reason,
        pushed_at=version.pushed_at,
        record=adapter.record,
        files=adapter.files,
        tensors=adapter.tensors,
        tensor_bytes=adapter.tensor_bytes,
        signatures=adapter.signatures,
        history=tuple(map(HistoryLine.model_validate_json, lines)),
    )


def loaded_task(task: TaskSnapshot) -> StoredTask:
    versions = tuple(
        StoredVersion(
            version=each.version,
            state=each.state,
            digest=each.digest,
            method=each.record.method,
            base=each.record.base,
            pushed_at=each.pushed_at,
            reason=each.reason,
            changed=each.history[-1].revision,
            warmed=each.warmed,
        )
        for each in task.versions
    )
    return StoredTask(task=task.task, routing=task.routing, versions=versions)
