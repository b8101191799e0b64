"""What the registry needs from where the files of adapters lie: the cut behind which a folder and a bucket
stand.

Every method but `close` blocks, and is called from worker threads. What is not on this machine's disk answers
within bounds, or StoreUnavailableError is raised.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(slots=True)
class Keeping:
    """How it went for the files that are kept. `known`: no version entered, for these were one already."""

    known: bool = False


class FileStore(Protocol):
    @property
    def place(self) -> str:
        """Where the files lie, for people."""
        ...

    def stage(self) -> AbstractContextManager[Path]:
        """An empty folder on this machine's disk that is gone afterwards, unless `kept` has moved it."""
        ...

    def kept(self, checked: Sequence[tuple[Path, str]]) -> AbstractContextManager[Keeping]:
        """Stores staged folders under the digests that they were checked to have; inside, nobody removes
        them: time to enter the versions.

        Raises StoreUnavailableError, before anything is entered.
        """
        ...

    def remove(self, digest: str, needed: Callable[[], frozenset[str]]) -> None:
        """Removes the files of `digest`, unless they are `needed` by a version.

        Raises StoreUnavailableError; what stays is removed by the next `remove`, or `sweep`.
        """
        ...

    def file(self, digest: str, name: str) -> Path:
        """Where a file can be read for some seconds at least, on this machine. `name` is one of the stored
        names. Raises StoredFilesDamagedError, StoreUnavailableError."""
        ...

    def sweep(self, needed: Callable[[], frozenset[str]]) -> int:
        """Removes what killed registries left: half uploads, files that no version needs.

        Says of how many `needed` adapters the files are missing. Raises StoreUnavailableError.
        """
        ...

    def require_room(self, nbytes: int) -> None:
        """Raises StorageFullError if fewer bytes than that are free on this machine's disk,
        StoreUnavailableError if the files cannot be reached."""
        ...

    def close(self) -> None: ...
