"""A registry in one file, to go from one store to another: what the store holds, and its adapters' files.

    registry.json                    `Snapshot`
    artefacts/<digest>/<file>        of every version that is not deleted

The file is a plain tar. What is read back is checked like anything that arrives: known names only, each
adapter against its digest, and nothing is stored unless all of it is right.
"""

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from adapter_registry.errors import AdapterRefusedError, RegistryError
from adapter_registry.file_store import FileStore
from adapter_registry.snapshot import Snapshot
from adapter_registry.staging import check
from adapter_registry.storage import storing
from adapter_registry.store import Store
from adapter_registry.versions import State
from prad.artefact import FILES
from prad.artefact.signing import verifies

_INDEX = "registry.json"
_ARTEFACTS = "artefacts"
_INDEX_BYTES = 1 << 30


class ExportError(RegistryError):
    """The file cannot be written, or read as an export."""

    code = "export_failed"


def write_export(store: Store, files: FileStore, path: Path) -> Snapshot:
    """Writes `path`, whole or not at all; what it holds. Raises ExportError, StoredFilesDamagedError."""
    found = store.dump()
    try:
        with _whole(path) as beside, tarfile.open(beside, "w") as tar:
            with tempfile.NamedTemporaryFile() as index:
                index.write(found.model_dump_json().encode())
                index.flush()
                tar.add(index.name, _INDEX)
            for digest, names in sorted(_needed(found).items()):
                for name in names:
                    tar.add(files.file(digest, name), f"{_ARTEFACTS}/{digest}/{name}")
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    return found


def read_export(store: Store, files: FileStore, path: Path) -> Snapshot:
    """Everything in `path` becomes what this registry, an empty one, holds.

    Raises ExportError, NotEmptyError, StorageFullError.
    """
    try:
        with tarfile.open(path, "r:") as tar, ExitStack() as staging:
            found = _index(tar, path)
            arrived: dict[str, Path] = {}
            while (member := tar.next()) is not None:
                digest, name = _place(member, path)
                if digest not in arrived:
                    arrived[digest] = staging.enter_context(files.stage())
                with storing(), (arrived[digest] / name).open("wb") as file:
                    for piece in _pieces(tar, member):
                        file.write(piece)
            with storing():
                _store(store, files, found, arrived, path)
    except tarfile.TarError as error:
        raise ExportError(f"{path} is no export of a registry: {error}") from error
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from error
    return found


def _store(store: Store, files: FileStore, found: Snapshot, arrived: dict[str, Path], path: Path) -> None:
    checked: list[tuple[Path, str]] = []
    for digest in _needed(found):
        if digest not in arrived:
            raise ExportError(f"{path} lacks the files of adapter {digest}; export again")
        try:
            adapter = check(arrived[digest])
        except AdapterRefusedError as error:
            raise ExportError(f"{path}: adapter {digest} is damaged: {error.message}") from error
        if adapter.digest != digest:
            raise ExportError(f"{path}: the files of adapter {digest} have digest {adapter.digest}")
        checked.append((arrived[digest], digest))
    _require_signed(found, path)
    with files.kept(checked):
        store.load(found)


def _require_signed(found: Snapshot, path: Path) -> None:
    """That whoever is said to have signed something did."""
    for version in found.versions:
        for each in version.signatures:
            if not verifies(each, version.digest):
                raise ExportError(
                    f"{path}: {version.name} has a signature that {each.fingerprint} did not make"
                )


def _needed(found: Snapshot) -> dict[str, list[str]]:
    """By digest: the files of every adapter that some version has still."""
    return {
        version.digest: [file.name for file in version.files]
        for version in found.versions
        if version.state is not State.DELETED
    }


def _index(tar: tarfile.TarFile, path: Path) -> Snapshot:
    first = tar.next()
    if first is None or first.name != _INDEX or not first.isfile() or first.size > _INDEX_BYTES:
        raise ExportError(f"{path} is no export of a registry: it does not begin with {_INDEX}")
    try:
        return Snapshot.model_validate_json(b"".join(_pieces(tar, first)))
    except ValidationError as error:
        first_problem = error.errors()[0]
        where = ".".join(map(str, first_problem["loc"]))
        raise ExportError(
            f"{path}: {_INDEX} cannot be read ({where}: {first_problem['msg']}); the program that imports "
            "must be at least as new as the one that exported"
        ) from error


def _place(member: tarfile.TarInfo, path: Path) -> tuple[str, str]:
    parts = PurePosixPath(member.name).parts
    if not member.isfile() or len(parts) != 3 or parts[0] != _ARTEFACTS or parts[2] not in FILES:
        raise ExportError(f"{path} holds {member.name!r}, which no export of a registry has")
    return parts[1], parts[2]


def _pieces(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    file = tar.extractfile(member)
    while file is not None and (piece := file.read(1 << 20)):
        yield piece


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """What is written to the file inside becomes `path` at the end, unless something is raised."""
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=path.absolute().parent) as folder:
        beside = Path(folder, "export")
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
