"""The tasks that can be served now: what new requests are resolved against, replaced whole at each change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefill_service.api.protocols import TaskEntry
from prefill_service.errors import UnknownModelError
from prefill_service.generation import TaskVersion

_NAMED = 8  # tasks that an error message lists


@dataclass(frozen=True, slots=True)
class TaskVersions:
    """One task: the version that its plain name means (None: only explicit ones), and all that answer."""

    current: int | None
    versions: Mapping[int, TaskVersion]


class TaskCatalogue:
    """Implements `prefill_service.api.protocols.Catalogue`."""

    def __init__(self, base_name: str) -> None:
        self._base_name = base_name
        self._tasks: Mapping[str, TaskVersions] = {}

    @property
    def base_name(self) -> str:
        return self._base_name

    def replace(self, tasks: Mapping[str, TaskVersions]) -> None:
        """From now on new requests see `tasks`; running ones keep what they resolved."""
        self._tasks = dict(tasks)

    def resolve(self, task: str, version: int | None) -> TaskVersion:
        found = self._tasks.get(task)
        if found is None:
            known = ", ".join(sorted(self._tasks)[:_NAMED]) or "none yet"
            raise UnknownModelError(f"there is no task or model '{task}' (tasks: {known})")
        wanted = found.current if version is None else version
        if wanted is not None and wanted in found.versions:
            return found.versions[wanted]
        answering = ", ".join(f"{task}@{v}" for v in sorted(found.versions)) or "none"
        if version is None:
            raise UnknownModelError(f"task '{task}' has no current version (it answers as: {answering})")
        raise UnknownModelError(f"there is no {task}@{version} (it answers as: {answering})")

    def tasks(self) -> Sequence[TaskEntry]:
        return [
            TaskEntry(name, task.versions[task.current], tuple(sorted(task.versions)))
            for name, task in sorted(self._tasks.items())
            if task.current is not None and task.current in task.versions
        ]
