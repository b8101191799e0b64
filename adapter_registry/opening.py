"""Where a registry's data are, opened: a store, and the folder or the bucket of the files that belong to it.

<data_dir>/registry.sqlite3, staging/, artefacts/     without Redis; locked by the one registry that uses it
<data_dir>/redis/<id of the registry there>/          with Redis; shared by all registries on it

With a bucket, s3://BUCKET/FOLDER/<id of the registry>/ takes the place of artefacts/, where copies/ is then.
Without Redis the id is drawn once, and lies in <data_dir>/bucket-id.
"""

import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from adapter_registry.artefacts import ArtefactFolder
from adapter_registry.bucket import MOST_BYTES, Bucket
from adapter_registry.bucket_files import ArtefactBucket
from adapter_registry.errors import CannotStartError
from adapter_registry.file_store import FileStore
from adapter_registry.redis_store import RedisStore
from adapter_registry.settings import MIB, RegistrySettings
from adapter_registry.sqlite_store import SqliteStore

SQLITE_FILE = "registry.sqlite3"
BUCKET_ID_FILE = "bucket-id"


@dataclass(frozen=True, slots=True)
class OpenedData:
    """`lock`: None where others may use the same."""

    store: SqliteStore | RedisStore
    files: FileStore
    lock: FileLock | None

    @property
    def place(self) -> str:
        """Where that is, for people."""
        redis = f", Redis {self.store.address}" if isinstance(self.store, RedisStore) else ""
        return f"{self.files.place}{redis}"

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
        return _with_redis(RedisStore(settings.redis_url, replicas=settings.redis_replicas), settings)
    lock = _lock(settings.folder)
    try:
        store = SqliteStore(settings.folder / SQLITE_FILE)
        return OpenedData(store, _files(settings, settings.folder, None), lock)
    except CannotStartError:
        lock.release()
        raise


def _with_redis(store: RedisStore, settings: RegistrySettings) -> OpenedData:
    try:
        folder = settings.folder / "redis" / store.identity
        return OpenedData(store, _files(settings, folder, store.identity), None)
    except CannotStartError:
        store.close()
        raise


def _files(settings: RegistrySettings, folder: Path, identity: str | None) -> FileStore:
    """`identity`: of the registry, where the store knows one."""
    place = settings.bucket
    try:
        if place is None:
            return ArtefactFolder(folder)
        _require_extra()
        _require_fits(settings)
        bucket = Bucket(place, identity or _bucket_id(folder), settings.files_endpoint)
        return ArtefactBucket(bucket, folder, settings.copies_mib * MIB)
    except OSError as error:
        raise _unusable(folder, error) from error


def _bucket_id(folder: Path) -> str:
    """What keeps registries apart that have one bucket: none may remove what another needs."""
    file = folder / BUCKET_ID_FILE
    if not file.exists():
        beside = file.with_suffix(".new")
        beside.write_text(uuid.uuid4().hex, encoding="utf-8")
        beside.replace(file)
    return file.read_text(encoding="utf-8").strip()


def _require_extra() -> None:
    if find_spec("s3fs") is None:
        raise CannotStartError(
            "files in a bucket need the package s3fs, which is not installed here: pip install "
            "'prad-server[s3]', and start again"
        )


def _require_fits(settings: RegistrySettings) -> None:
    if settings.max_upload_bytes > MOST_BYTES:
        raise CannotStartError(
            f"max_upload_mib is {settings.max_upload_mib}, and a bucket takes objects of at most "
            f"{MOST_BYTES // MIB} MiB in one request: set it to that, or keep the files in data_dir"
        )


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
        raise _unusable(folder, error) from error
    return lock


def _unusable(folder: Path, error: OSError) -> CannotStartError:
    return CannotStartError(
        f"cannot use the data folder {folder}: {error.strerror}; let this user write there, or choose "
        "another data_dir (PRAD_REGISTRY_DATA_DIR)"
    )
