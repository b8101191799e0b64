"""Making room on the registry's disk: files of versions that answer nothing any more, oldest out first."""

import logging
from collections import Counter
from collections.abc import Sequence

from adapter_registry.errors import IllegalTransitionError, StorageFullError, StoreUnavailableError
from adapter_registry.file_store import FileStore
from adapter_registry.planning import Move
from adapter_registry.storage import storing
from adapter_registry.store import Idle, Store
from adapter_registry.versions import Event

logger = logging.getLogger(__name__)


def surplus(idle: Sequence[Idle], bound: int) -> tuple[Idle, ...]:
    """The first of `idle`, so many that the files of the rest fit into `bound` bytes."""
    users = Counter(version.digest for version in idle)
    left = sum({version.digest: version.nbytes for version in idle}.values())
    found = []
    for version in idle:
        if left <= bound:
            break
        found.append(version)
        users[version.digest] -= 1  # files that several versions have go with the last of them
        left -= 0 if users[version.digest] else version.nbytes
    return tuple(found)


def make_room(store: Store, files: FileStore, bound: int) -> bool:
    """Deletes idle versions beyond `bound` bytes; whether there were any. Blocks."""
    found = surplus(store.idle(), bound)
    for version in found:
        try:
            with storing():
                store.change(version.task, Move(version.version, Event.DELETE), reason="made room for others")
        except (IllegalTransitionError, StorageFullError) as error:  # unretired meanwhile; or the next sweep
            logger.warning("%s@%d stays on disk: %s", version.task, version.version, error)
            continue
        try:
            files.remove(version.digest, store.digests)
        except StoreUnavailableError as error:  # the sweep at the next start removes them
            logger.warning("the files of %s@%d stay: %s", version.task, version.version, error)
            continue
        logger.info("deleted %s@%d, digest %s, to make room", version.task, version.version, version.digest)
    return bool(found)
