"""Files of an adapter that arrive over the network: known names, into a fresh folder, whole or not used."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_registry.errors import DigestMismatchError, FolderInUseError
from adapter_registry.messages import VersionRecord
from prad.artefact import FILES, Artefact, ArtefactError, read_artefact
from prad.artefact.signatures import Signature, Signatures, write_signatures


def place(staged: Path, name: str) -> Path:
    """Where a file of that name goes; the names came over the network. Raises DigestMismatchError."""
    if name not in FILES:
        raise DigestMismatchError(f"the registry offers a file {name!r}, which no adapter has")
    return staged / name


def read(staged: Path, digest: str, name: str) -> Artefact:
    """The adapter that arrived. Raises DigestMismatchError if it is not that of `digest`."""
    try:
        arrived = read_artefact(staged)
    except ArtefactError as error:
        raise DigestMismatchError(f"the files of {name} arrived damaged: {error}") from error
    if arrived.digest != digest:
        raise DigestMismatchError(
            f"the files of {name} have digest {arrived.digest}, expected {digest}; push the adapter again"
        )
    return arrived


def place_signatures(staged: Path, record: VersionRecord) -> None:
    """Who signed it goes beside its files, as it came."""
    if record.signatures:
        signatures = tuple(Signature(key=each.key, signature=each.signature) for each in record.signatures)
        write_signatures(staged, Signatures(digest=record.digest, signatures=signatures))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """What is written inside becomes `folder` at the end, unless something is raised.

    Raises FolderInUseError if it holds something, OSError.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FolderInUseError(f"{folder} is there already, and not an empty folder; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pulling-", dir=folder.parent) as beside:
        staged = Path(beside, "files")
        staged.mkdir()
        yield staged
        staged.rename(folder)
