"""Copies on the registry's disk of adapters that lie in a bucket: `<data>/copies/<digest>/`, whole and right.

What was just pushed is here, and what a replica asks for is fetched once for all of them. Nothing is kept
that the bucket does not have: it may all be deleted at any time.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from adapter_registry.staging import Staging
from prad.artefact import files_digest

_READ_S = 60.0
"""Whoever was told of a copy has opened it by then."""


class Copies:
    """Bounded by `capacity` bytes, least recently used out first. Registries that share `data` share them."""

    def __init__(self, data: Path, staging: Staging, capacity: int) -> None:
        self._folder = data / "copies"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._staging = staging
        self._capacity = capacity
        self._verified: set[str] = set()

    def find(self, digest: str) -> Path | None:
        """Where it lies, if it does. It may have been torn by a crash: the first look reads all of it."""
        folder = self._folder / digest
        try:
            os.utime(folder)
        except FileNotFoundError:
            return None
        if digest not in self._verified:
            if files_digest(folder) != digest:
                self.drop(digest)
                return None
            self._verified.add(digest)
        return folder

    def keep(self, staged: Path, digest: str) -> Path:
        """Makes the staged files, which have that digest, the copy; where it lies."""
        if (found := self.find(digest)) is not None:
            return found
        folder = self._folder / digest
        with suppress(OSError):  # another registry was first, with the same files; another reason shows below
            staged.rename(folder)
        os.utime(folder)
        self._verified.add(digest)
        self._make_room()
        return folder

    def drop(self, digest: str) -> None:
        """There is no such copy afterwards."""
        self._verified.discard(digest)
        gone = self._staging.new_folder()
        with suppress(FileNotFoundError):
            (self._folder / digest).rename(gone / digest)
        shutil.rmtree(gone, ignore_errors=True)

    def _make_room(self) -> None:
        found = []
        for folder in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another registry took it as we looked
                nbytes = sum(path.stat().st_size for path in folder.iterdir())
                found.append((folder.stat().st_mtime, nbytes, folder.name))
        left = sum(nbytes for _, nbytes, _ in found)
        for used, nbytes, digest in sorted(found):
            if left <= self._capacity or time.time() - used < _READ_S:
                break
            self.drop(digest)
            left -= nbytes
