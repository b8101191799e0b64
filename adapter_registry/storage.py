"""A full disk, said as what it is: by the files, by SQLite, and before it is reached."""

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_registry.errors import StorageFullError

MIB = 1 << 20


@contextmanager
def storing() -> Iterator[None]:
    """Around what writes. Raises StorageFullError in place of whatever a full disk makes of it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full() from error
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise _full() from error


def require_free(folder: Path, nbytes: int) -> None:
    """Raises StorageFullError if fewer bytes than that are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise StorageFullError(
            f"the registry's disk has {free // MIB} MiB free, less than the {nbytes // MIB} MiB it keeps free"
            " (min_free_mib); delete versions (prad adapter rm), or give it more disk"
        )


def _full() -> StorageFullError:
    return StorageFullError(
        "the registry's disk is full, and nothing was stored; delete versions (prad adapter rm), or give it "
        "more disk, and try again"
    )
