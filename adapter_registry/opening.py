"""Where a registry's data are, opened: a store, and the folder of the files that belong to it.

<data_dir>/registry.sqlite3, staging/, artefacts/     without Redis; locked by the one registry that uses it
<data_dir>/redis/<id of the registry there>/          with Redis; shared by all registries on it
"""

from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from adapter_registry.artefacts import ArtefactFolder
from adapter_registry.errors import CannotStartError
from adapter_registry.redis_store import RedisStore
from adapter_registry.settings import RegistrySettings
from adapter_registry.sqlite_store import SqliteStore

SQLITE_FILE = "registry.sqlite3"


@dataclass(frozen=True, slots=True)
class OpenedData:
    """`lock`: None where others may use the same."""

    store: SqliteStore | RedisStore
    files: ArtefactFolder
    lock: FileLock | None

    @property
    def place(self) -> str:
        """Where that is, for people."""
        redis = f", Redis {self.store.address}" if isinstance(self.store, RedisStore) else ""
        return f"{self.files.folder}{redis}"

    def overlooked(self, settings: RegistrySettings) -> tuple[str, ...]:
        """That a Redis without versions was given to a folder that has some, which is how one moves there."""
        file = settings.folder / SQLITE_FILE
        if self.lock is not None or not file.exists() or self.store.revision():
            return ()
        return (
            f"the versions in {file} are not in this Redis, which has none yet; to bring them along: prad "
            "registry export FILE without redis_url, then prad registry import FILE with it",
        )

    def close(self) -> None:
        self.store.close()
        self.files.close()
        if self.lock is not None:
            self.lock.release()


def open_data(settings: RegistrySettings) -> OpenedData:
    """Raises CannotStartError."""
    if settings.redis_url:
        return _with_redis(RedisStore(settings.redis_url, replicas=settings.redis_replicas), settings.folder)
    lock = _lock(settings.folder)
    try:
        store = SqliteStore(settings.folder / SQLITE_FILE)
        return OpenedData(store, _files(settings.folder), lock)
    except CannotStartError:
        lock.release()
        raise


def _with_redis(store: RedisStore, folder: Path) -> OpenedData:
    try:
        return OpenedData(store, _files(folder / "redis" / store.identity), None)
    except CannotStartError:
        store.close()
        raise


def _files(folder: Path) -> ArtefactFolder:
    try:
        return ArtefactFolder(folder)
    except OSError as error:
        raise CannotStartError(f"cannot use the data folder {folder}: {error.strerror}") from error


def _lock(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "registry.lock", thread_local=False)
        lock.acquire(timeout=0)
    except Timeout:
        raise CannotStartError(
            f"another registry uses {folder}; stop it, or choose another data_dir"
        ) from None
    except OSError as error:
        raise CannotStartError(f"cannot use the data folder {folder}: {error.strerror}") from error
    return lock
