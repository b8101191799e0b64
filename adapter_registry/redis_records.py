"""What the Redis store keeps of a task, a version and an adapter, as JSON; and what a change makes of it."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from adapter_registry.api import HistoryLine, StoredFile, TaskRoute, VersionRecord, VersionRoute
from adapter_registry.routing import Change, TaskView
from adapter_registry.rows import no_task
from adapter_registry.snapshot import TaskSnapshot
from adapter_registry.store import StoredAdapter
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
        return TaskView(
            self.task, self.current, {v.version: v.state for v in self.versions}, self.routing_revision
        )


class StoredFiles(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    record: AdapterRecord
    files: tuple[StoredFile, ...]
    tensors: int
    tensor_bytes: int

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of history, of which version."""

    version: int
    line: HistoryLine


def read(text: str | bytes | None) -> StoredTask | None:
    return None if text is None else StoredTask.model_validate_json(text)


def there(found: StoredTask | None, task: str) -> StoredTask:
    if found is None:
        raise no_task(task)
    return found


def added(
    known: StoredTask, number: int, adapter: StoredAdapter, revision: int, at: str
) -> tuple[StoredTask, list[Line]]:
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
    line = HistoryLine(
        revision=revision,
        event=Event.PUSH,
        before=None,
        after=State.PUSHED,
        current=known.current,
        at=at,
        replica="",
        reason="",
    )
    task = known.model_copy(update={"versions": (*known.versions, version)})
    return task, [Line(number, line)]


def moved(
    known: StoredTask,
    changes: tuple[Change, ...],
    revision: int,
    at: str,
    replica: str = "",
    reason: str = "",
) -> tuple[StoredTask, list[Line]]:
    """The task after `changes`, the first of which is the one after `revision`."""
    lines = []
    for number, change in enumerate(changes, start=revision + 1):
        known = _after(known, change, number, reason)
        line = HistoryLine(
            revision=number,
            event=change.event,
            before=change.before,
            after=change.after,
            current=change.current,
            at=at,
            replica=replica,
            reason=reason,
        )
        lines.append(Line(change.version, line))
    return known, lines


def _after(known: StoredTask, change: Change, revision: int, reason: str) -> StoredTask:
    def changed(version: StoredVersion) -> StoredVersion:
        # what is deleted goes on saying why it had failed
        why = version.reason if change.event is Event.DELETE else reason
        return version.model_copy(update={"state": change.after, "reason": why, "changed": revision})

    versions = tuple(changed(v) if v.version == change.version else v for v in known.versions)
    rerouted = {"routing_revision": revision} if change.event.reroutes else {}
    return known.model_copy(update={"versions": versions, "current": change.current, **rerouted})


def record(task: StoredTask, version: StoredVersion, adapter: StoredFiles, lines: list[str]) -> VersionRecord:
    return VersionRecord(
        task=task.task,
        version=version.version,
        state=version.state,
        current=task.current == version.version,
        digest=version.digest,
        reason=version.reason,
        pushed_at=version.pushed_at,
        record=adapter.record,
        files=adapter.files,
        tensors=adapter.tensors,
        tensor_bytes=adapter.tensor_bytes,
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
        )
        for each in task.versions
    )
    return StoredTask(
        task=task.task, current=task.current, routing_revision=task.routing_revision, versions=versions
    )
