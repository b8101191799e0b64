"""How much one task may hold of versions that answer or may come to: a trainer that pushes for ever meets it.

Retired and failed versions count no more; `retired_mib` bounds their files.
"""

from collections.abc import Sequence

from adapter_registry.errors import QuotaExceededError, TaskNotFoundError
from adapter_registry.messages import StoredFile, VersionRecord, VersionRoute
from adapter_registry.settings import Bounds
from adapter_registry.store import Store, StoredAdapter
from adapter_registry.versions import State

_COUNTED = (State.PUSHED, State.VERIFIED, State.ROUTABLE)


def require_quota(store: Store, bounds: Bounds, task: str, adapter: StoredAdapter) -> None:
    """Raises QuotaExceededError, unless these files are a version already. Pushes of the same moment may pass
    it together."""
    if not _bounded(bounds):
        return
    known = _counted(store, task)
    if all(version.digest != adapter.digest for version in known):
        _require_fits(store, bounds, task, known, adapter.files)


def require_quota_again(store: Store, bounds: Bounds, record: VersionRecord) -> None:
    """Raises QuotaExceededError, if the version counts for nothing now, and would be too much beside those
    that do."""
    if _bounded(bounds) and record.state not in _COUNTED:
        _require_fits(store, bounds, record.task, _counted(store, record.task), record.files)


def _bounded(bounds: Bounds) -> bool:
    return bounds.task_versions is not None or bounds.task_bytes is not None


def _counted(store: Store, task: str) -> list[VersionRoute]:
    try:
        return [version for version in store.task(task).versions if version.state in _COUNTED]
    except TaskNotFoundError:
        return []


def _require_fits(
    store: Store, bounds: Bounds, task: str, known: Sequence[VersionRoute], files: Sequence[StoredFile]
) -> None:
    most, most_bytes = bounds.task_versions, bounds.task_bytes
    if most is not None and len(known) >= most:
        raise QuotaExceededError(
            f"{task!r} has {len(known)} versions that are not retired, as many as it may (task_versions); "
            f"retire some first, as in: prad adapter retire {task}@{known[0].version}",
            param="task",
        )
    if most_bytes is not None:
        records = (store.version(task, version.version) for version in known)
        held = sum(file.size for record in records for file in record.files)
        more = sum(file.size for file in files)
        if held + more > most_bytes:
            raise QuotaExceededError(
                f"{task!r} has {held} bytes of versions that are not retired, and with {more} more it has "
                f"over {most_bytes}, what a task may (task_mib): retire some first, or push a smaller one",
                param="task",
            )
