"""All that a store holds, as plain data: what goes from one store to another."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from adapter_registry.api import HistoryLine, TaskRoute, VersionRecord
from adapter_registry.errors import NotEmptyError


class TaskSnapshot(BaseModel):
    """A task's routing; its versions in order, each with its history."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    current: int | None
    routing_revision: int
    versions: tuple[VersionRecord, ...]


class Snapshot(BaseModel):
    """A store at one revision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    revision: int
    tasks: tuple[TaskSnapshot, ...]

    @property
    def versions(self) -> tuple[VersionRecord, ...]:
        return tuple(version for task in self.tasks for version in task.versions)

    @property
    def lines(self) -> list[tuple[VersionRecord, HistoryLine]]:
        """Every change there was, in its order."""
        found = [(version, line) for version in self.versions for line in version.history]
        return sorted(found, key=lambda each: each[1].revision)


def snapshot(revision: int, tasks: Iterable[tuple[TaskRoute, Iterable[VersionRecord]]]) -> Snapshot:
    """Of each task its routing, and the records of its versions."""
    return Snapshot(
        revision=revision,
        tasks=tuple(
            TaskSnapshot(
                task=route.task,
                current=route.current,
                routing_revision=route.routing_revision,
                versions=tuple(versions),
            )
            for route, versions in tasks
        ),
    )


def require_empty(tasks: int) -> None:
    """Raises NotEmptyError."""
    if tasks:
        raise NotEmptyError(
            f"this registry has {tasks} tasks already; an export is read into an empty one: choose another "
            "data_dir, or another Redis database"
        )
