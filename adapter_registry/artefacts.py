"""The files of adapters on the registry's disk: staged, checked, then moved to their digest.

    <data>/staging/<process>-<random>/   being uploaded; of the dead, removed at every start
    <data>/artefacts/<digest>/           complete, checked, flushed; a folder appears here by one rename
    <data>/processes/                    which registries live that share this folder (`Tenant`)

A version enters the database only after its folder is here, and leaves it before: a kill at any moment leaves
whole versions and, at worst, a folder that no version needs, which `sweep` removes at the next start.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from adapter_registry.errors import AdapterRefusedError, StoredFilesDamagedError
from adapter_registry.messages import StoredFile
from adapter_registry.store import StoredAdapter
from adapter_registry.tenants import Tenant
from prad.artefact import Artefact, ArtefactError, files_digest, read_servable


class ArtefactFolder:
    """Raises OSError if `data` cannot be written."""

    def __init__(self, data: Path) -> None:
        self.folder = data
        self._staging = data / "staging"
        self._artefacts = data / "artefacts"
        self._lock = threading.Lock()
        for folder in (self._staging, self._artefacts):
            folder.mkdir(parents=True, exist_ok=True)
        self._tenant = Tenant(data / "processes")

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """An empty folder that is gone afterwards, unless `keep` has moved it."""
        folder = self._new_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def check(self, staged: Path) -> StoredAdapter:
        """Reads the staged files. Raises AdapterRefusedError."""
        try:
            artefact = read_servable(staged)
        except ArtefactError as error:
            raise AdapterRefusedError(
                str(error).replace(str(staged), "the adapter"), param="files"
            ) from error
        return _describe(artefact)

    @contextmanager
    def kept(self, checked: Sequence[tuple[Path, str]]) -> Iterator[None]:
        """Moves staged folders to the digests that they were checked to have; inside, nobody removes them:
        time to enter the versions."""
        for staged, _ in checked:
            _flush(staged)
        with self._alone():
            for staged, digest in checked:
                self._move(staged, self._artefacts / digest)
            yield

    def remove(self, digest: str, needed: Callable[[], frozenset[str]]) -> None:
        """Removes the files of `digest`, unless they are `needed` by a version."""
        with self._alone():
            if digest in needed():
                return
            gone = self._new_folder()
            with suppress(FileNotFoundError):
                (self._artefacts / digest).rename(gone / digest)
        shutil.rmtree(gone, ignore_errors=True)

    def file(self, digest: str, name: str) -> Path:
        """Where a file lies. `name` is one of the stored names. Raises StoredFilesDamagedError."""
        path = self._artefacts / digest / name
        if not path.is_file():
            raise StoredFilesDamagedError(
                f"{name} of adapter {digest} is gone from the registry's disk; push it again"
            )
        return path

    def sweep(self, needed: Callable[[], frozenset[str]]) -> int:
        """Removes what killed registries left: half uploads, folders that no version needs.

        Says of how many `needed` adapters the files are missing.
        """
        with self._alone():
            living = self._tenant.living()
            for folder in self._staging.iterdir():
                if folder.name.partition("-")[0] not in living:
                    shutil.rmtree(folder, ignore_errors=True)
            known = needed()
            found = {folder.name for folder in self._artefacts.iterdir()}
            for name in found - known:
                shutil.rmtree(self._artefacts / name, ignore_errors=True)
        return len(known - found)

    def close(self) -> None:
        self._tenant.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread, and no other registry that shares the folder."""
        with self._lock, self._tenant.alone():
            yield

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{self._tenant.id}-", dir=self._staging))

    def _move(self, staged: Path, target: Path) -> None:
        if target.exists():
            if files_digest(target) == target.name:
                return
            # Damaged on disk; the same files arrived again, whole. The damaged ones go where they get swept.
            target.rename(staged.with_name(f"{staged.name}.damaged"))
        staged.rename(target)
        _flush_entry(self._artefacts)


def _describe(artefact: Artefact) -> StoredAdapter:
    with artefact.weights.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")  # safetensors: length of the header, header, tensors
    files = tuple(StoredFile(name=path.name, size=path.stat().st_size) for path in artefact.files)
    weights = artefact.weights.stat().st_size - 8 - header
    return StoredAdapter(artefact.digest, artefact.record, files, len(artefact.tensors), weights)


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        _flush_entry(path)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
