"""The files of adapters in a folder of the registry's disk: staged, checked, then moved to their digest.

    <data>/staging/              what is on its way (`staging.py`)
    <data>/artefacts/<digest>/   complete, checked, flushed; a folder appears here by one rename

A version enters the database only after its folder is here, and leaves it before: a kill at any moment leaves
whole versions and, at worst, a folder that no version needs, which `sweep` removes at the next start.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from adapter_registry.errors import StoredFilesDamagedError
from adapter_registry.file_store import Keeping
from adapter_registry.staging import Staging
from adapter_registry.storage import require_free
from prad.artefact import files_digest


class ArtefactFolder:
    """A `FileStore`. Raises OSError if `data` cannot be written."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._artefacts = data / "artefacts"
        self._artefacts.mkdir(parents=True, exist_ok=True)
        self._staging = Staging(data)

    @property
    def place(self) -> str:
        return str(self._data)

    def stage(self) -> AbstractContextManager[Path]:
        return self._staging.stage()

    @contextmanager
    def kept(self, checked: Sequence[tuple[Path, str]]) -> Iterator[Keeping]:
        for staged, _ in checked:
            _flush(staged)
        with self._staging.alone():
            for staged, digest in checked:
                self._move(staged, self._artefacts / digest)
            yield Keeping()

    def remove(self, digest: str, needed: Callable[[], frozenset[str]]) -> None:
        with self._staging.alone():
            if digest in needed():
                return
            gone = self._staging.new_folder()
            with suppress(FileNotFoundError):
                (self._artefacts / digest).rename(gone / digest)
        shutil.rmtree(gone, ignore_errors=True)

    def file(self, digest: str, name: str) -> Path:
        path = self._artefacts / digest / name
        if not path.is_file():
            raise StoredFilesDamagedError(
                f"{name} of adapter {digest} is gone from the registry's disk; push it again"
            )
        return path

    def sweep(self, needed: Callable[[], frozenset[str]]) -> int:
        with self._staging.alone():
            for folder in self._staging.abandoned():
                shutil.rmtree(folder, ignore_errors=True)
            known = needed()
            found = {folder.name for folder in self._artefacts.iterdir()}
            for name in found - known:
                shutil.rmtree(self._artefacts / name, ignore_errors=True)
        return len(known - found)

    def require_room(self, nbytes: int) -> None:
        require_free(self._data, nbytes)

    def close(self) -> None:
        self._staging.close()

    def _move(self, staged: Path, target: Path) -> None:
        if target.exists():
            if files_digest(target) == target.name:
                return
            # Damaged on disk; the same files arrived again, whole. The damaged ones go where they get swept.
            target.rename(staged.with_name(f"{staged.name}.damaged"))
        staged.rename(target)
        _flush_entry(self._artefacts)


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
