"""Adapters in folders of the registry's machine: file://, within a folder that is allowed.

The registry may be able to read what whoever pushes may not, so no link is followed below the allowed folder:
each name is opened relative to the one before, and whatever is a link is refused, however fast it is made
one.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from adapter_registry.sources.arrival import NAMES, PIECE_BYTES, Arrival, Promised
from adapter_registry.sources.places import Place
from prad.artefact import RECORD

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not keep anybody waiting


def copy(place: Place, allowed: Place, arrival: Arrival) -> str:
    """Copies the known files of a folder; which that was. `allowed`: the place that holds it, whose own name
    may be a link; if that is the root, the folder's name as well.

    Raises AdapterRefusedError, UploadTooLargeError, SourceUnavailableError, StorageFullError.
    """
    trusted = allowed.path or place.path
    with _opened(f"/{'/'.join(trusted)}", place.path[len(trusted) :], arrival) as folder:
        for name in NAMES:
            try:
                file = os.open(name, os.O_RDONLY | os.O_CLOEXEC | _NO_LINK, dir_fd=folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise arrival.refused(_why(name, error)) from error
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise arrival.refused(f"{name} is not a plain file; upload the files instead")
                arrival.write(name, _pieces(file), Promised(os.fstat(file).st_size))
            finally:
                os.close(file)
    return f"file://{quote(f'/{place.folder}')}"


@contextmanager
def _opened(trusted: str, names: tuple[str, ...], arrival: Arrival) -> Iterator[int]:
    """The descriptor of a folder, `names` below the trusted one."""
    try:
        folder = os.open(trusted, _FOLDER)
    except OSError as error:
        raise arrival.refused(_why(trusted, error)) from error
    try:
        for name in names:
            try:
                below = os.open(name, _FOLDER | _NO_LINK, dir_fd=folder)
            except OSError as error:
                raise arrival.refused(_why(name, error)) from error
            os.close(folder)
            folder = below
        yield folder
    finally:
        os.close(folder)


def _why(name: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no folder {name}, so it holds no {RECORD}"
    if error.errno == errno.ELOOP:
        return f"{name} is a link, not a plain file, and none is followed; upload the files instead"
    if error.errno == errno.ENOTDIR:
        return f"{name} is no folder, or a link to one, and none is followed"
    return f"cannot read {name}: {error.strerror}"


def _pieces(file: int) -> Iterator[bytes]:
    while piece := os.read(file, PIECE_BYTES):
        yield piece
