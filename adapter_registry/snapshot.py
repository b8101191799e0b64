"""All that a store holds, as plain data: what goes from one store to another."""

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from adapter_registry.errors import InvalidTaskNameError, NotEmptyError
from adapter_registry.keys import StoredKey
from adapter_registry.messages import HistoryLine, TaskRoute, VersionRecord
from adapter_registry.names import check_task
from adapter_registry.routing import Routing
from adapter_registry.upgrading import upgraded_export


class TaskSnapshot(BaseModel):
    """A task's routing; its versions in order, each with its history; `history`: of changes of no version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    routing: Routing
    versions: tuple[VersionRecord, ...]
    history: tuple[HistoryLine, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        try:
            check_task(self.task)
        except InvalidTaskNameError as error:
            raise ValueError(error.message) from error
        numbers = [version.version for version in self.versions]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"{self.task} has versions {numbers}; expected 1, 2 and so on")
        answering = {version.version for version in self.versions if version.state.answers}
        previous = () if self.routing.previous is None else (self.routing.previous,)
        named = self.routing.named.union(previous, self.routing.shadow)
        if missing := sorted(named - answering):
            raise ValueError(f"{self.task} has no version {missing[0]} that answers, which its routing names")
        for version in self.versions:
            if version.task != self.task or not version.history:
                raise ValueError(f"{version.name} of {self.task} is another task's, or has no history")
        return self


class Snapshot(BaseModel):
    """A store at one revision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = 3
    revision: int
    tasks: tuple[TaskSnapshot, ...]
    keys: tuple[StoredKey, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_today(cls, data: Any) -> Any:
        """Also what an older program exported."""
        if not isinstance(data, dict):
            return data
        try:
            data = upgraded_export(data) if data.get("format") == 1 else data
        except (KeyError, TypeError) as error:
            raise ValueError(f"an export of format 1 has another shape: {error!r}") from error
        # since the second there is only more to be kept, of which an older export has none
        return data | {"format": 3} if data.get("format") == 2 else data

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        revisions = [*(line.revision for _, line in self.lines), *(key.revision for key in self.keys)]
        if len(set(revisions)) != len(revisions) or max(revisions, default=0) != self.revision:
            raise ValueError(f"the histories have a revision twice, or do not end at {self.revision}")
        if len({task.task for task in self.tasks}) != len(self.tasks):
            raise ValueError("a task is there twice")
        if len({key.name for key in self.keys}) != len(self.keys):
            raise ValueError("a key is there twice")
        return self

    @property
    def versions(self) -> tuple[VersionRecord, ...]:
        return tuple(version for task in self.tasks for version in task.versions)

    @property
    def lines(self) -> list[tuple[str, HistoryLine]]:
        """Every change there was, in its order, and of which task."""
        found = [
            (task.task, line)
            for task in self.tasks
            for lines in (task.history, *(version.history for version in task.versions))
            for line in lines
        ]
        return sorted(found, key=lambda each: each[1].revision)


def snapshot(
    revision: int,
    tasks: Iterable[tuple[TaskRoute, Iterable[VersionRecord], Iterable[HistoryLine]]],
    keys: Iterable[StoredKey],
) -> Snapshot:
    """Of each task its routing, the records of its versions, and its changes of no version; and all keys."""
    return Snapshot(
        revision=revision,
        keys=tuple(keys),
        tasks=tuple(
            TaskSnapshot(
                task=route.task, routing=route.routing, versions=tuple(versions), history=tuple(history)
            )
            for route, versions, history in tasks
        ),
    )


def require_empty(tasks: int, keys: int) -> None:
    """Raises NotEmptyError."""
    if tasks or keys:
        found = f"{tasks} tasks" if tasks else f"{keys} keys"
        raise NotEmptyError(
            f"this registry has {found} already; an export is read into an empty one: choose another "
            "data_dir, or another Redis database"
        )
