"""All that a store holds, as plain data: what goes from one store to another."""

from collections.abc import Iterable
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from adapter_registry.api import HistoryLine, TaskRoute, VersionRecord
from adapter_registry.errors import InvalidTaskNameError, NotEmptyError
from adapter_registry.names import check_task


class TaskSnapshot(BaseModel):
    """A task's routing; its versions in order, each with its history."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    current: int | None
    routing_revision: int
    versions: tuple[VersionRecord, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        try:
            check_task(self.task)
        except InvalidTaskNameError as error:
            raise ValueError(error.message) from error
        numbers = [version.version for version in self.versions]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"{self.task} has versions {numbers}; expected 1, 2 and so on")
        if self.current is not None and self.current not in numbers:
            raise ValueError(f"{self.task} has no version {self.current}, which is to be its current one")
        for version in self.versions:
            if version.task != self.task or not version.history:
                raise ValueError(f"{version.name} of {self.task} is another task's, or has no history")
        return self


class Snapshot(BaseModel):
    """A store at one revision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    revision: int
    tasks: tuple[TaskSnapshot, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        revisions = [line.revision for _, line in self.lines]
        if len(set(revisions)) != len(revisions) or max(revisions, default=0) != self.revision:
            raise ValueError(f"the histories have a revision twice, or do not end at {self.revision}")
        if len({task.task for task in self.tasks}) != len(self.tasks):
            raise ValueError("a task is there twice")
        return self

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
