"""Fetched adapters on a prefill's disk: `<cache_dir>/adapters/<digest>/`, whole and verified or not there."""

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapter_registry.errors import DigestMismatchError
from prad.artefact import FILES, Artefact, ArtefactError, read_artefact


class AdapterCache:
    """Several replicas may share one folder: entries appear by one rename, whoever comes first."""

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir.expanduser() / "adapters"

    async def find(self, digest: str) -> Artefact | None:
        """The adapter if it lies here whole; a damaged one is removed."""
        return await asyncio.to_thread(self._find, digest)

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """An empty folder beside the entries, gone afterwards unless kept."""
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".fetching-", dir=self._folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def target(self, staged: Path, name: str) -> Path:
        """Where a file of that name goes; the names came over the network. Raises DigestMismatchError."""
        if name not in FILES:
            raise DigestMismatchError(f"the registry offers a file {name!r}, which no adapter has")
        return staged / name

    async def keep(self, staged: Path, digest: str, name: str) -> Artefact:
        """Makes the staged files the entry of `digest`. Raises DigestMismatchError if they are not."""
        return await asyncio.to_thread(self._keep, staged, digest, name)

    def _find(self, digest: str) -> Artefact | None:
        folder = self._folder / digest
        if not folder.is_dir():
            return None
        try:
            artefact = read_artefact(folder)
        except ArtefactError:
            artefact = None
        if artefact is not None and artefact.digest == digest:
            return artefact
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def _keep(self, staged: Path, digest: str, name: str) -> Artefact:
        try:
            arrived = read_artefact(staged)
        except ArtefactError as error:
            raise DigestMismatchError(f"the files of {name} arrived damaged: {error}") from error
        if arrived.digest != digest:
            raise DigestMismatchError(
                f"the files of {name} have digest {arrived.digest}, expected {digest}; push the adapter again"
            )
        # It fails if another replica was first, with the same files; any other reason shows below.
        with suppress(OSError):
            staged.rename(self._folder / digest)
        found = self._find(digest)
        if found is None:
            raise DigestMismatchError(f"the files of {name} do not stay whole in {self._folder}")
        return found
