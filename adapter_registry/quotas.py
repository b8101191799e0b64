"""How much one task may hold of versions that answer or may come to: a trainer that pushes for ever meets it.

Retired and failed versions count no more; `retired_mib` bounds their files.
"""

from adapter_registry.errors import QuotaExceededError, TaskNotFoundError
from adapter_registry.settings import Bounds
from adapter_registry.store import Store, StoredAdapter
from adapter_registry.versions import State

_COUNTED = (State.PUSHED, State.VERIFIED, State.ROUTABLE)


def require_quota(store: Store, bounds: Bounds, task: str, adapter: StoredAdapter) -> None:
    """Raises QuotaExceededError, unless these files are a version already. Pushes of the same moment may pass
    it together."""
    most, most_bytes = bounds.task_versions, bounds.task_bytes
    if most is None and most_bytes is None:
        return
    try:
        known = [version for version in store.task(task).versions if version.state in _COUNTED]
    except TaskNotFoundError:
        known = []
    if any(version.digest == adapter.digest for version in known):
        return
    if most is not None and len(known) >= most:
        raise QuotaExceededError(
            f"{task!r} has {len(known)} versions that are not retired, as many as it may (task_versions); "
            f"retire some first, as in: prad adapter retire {task}@{known[0].version}",
            param="task",
        )
    if most_bytes is not None:
        records = (store.version(task, version.version) for version in known)
        held = sum(file.size for record in records for file in record.files)
        more = sum(file.size for file in adapter.files)
        if held + more > most_bytes:
            raise QuotaExceededError(
                f"{task!r} has {held} bytes of versions that are not retired, and with {more} more it has "
                f"over {most_bytes}, what a task may (task_mib): retire some first, or push a smaller one",
                param="task",
            )
