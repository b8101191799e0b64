"""What the registry needs from a database: the cut behind which SQLite and Redis stand.

Every method is one transaction, is called from worker threads, and leaves the store as it was if it raises
(but see StoreUnavailableError). The files of an adapter lie elsewhere (`artefacts.py`), and are there before
`push` is called.
"""

from dataclasses import dataclass
from typing import Protocol

from adapter_registry.api import RoutingState, StoredFile, TaskRoute, VersionRecord
from adapter_registry.snapshot import Snapshot
from adapter_registry.versions import Event
from prad.artefact import AdapterRecord


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A checked adapter whose files are stored under their digest."""

    digest: str
    record: AdapterRecord
    files: tuple[StoredFile, ...]
    tensors: int
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class Idle:
    """A version that answers nothing any more, whose files no version needs that does or may."""

    task: str
    version: int
    digest: str
    nbytes: int


class Store(Protocol):
    """Tasks, versions, history. `revision` grows with every change and never goes back.

    Every method but `close` raises StoreUnavailableError if the database is another program that does not
    answer now. Whether a change that it was asked for was made is not known then.
    """

    def push(self, task: str, adapter: StoredAdapter) -> tuple[int, bool]:
        """The version number of these files, and whether it is new.

        Files that already are a version of this task, neither retired nor deleted, get that one's number.
        """
        ...

    def apply(
        self,
        task: str,
        version: int,
        event: Event,
        *,
        force: bool = False,
        expected: int | None = None,
        replica: str = "",
        reason: str = "",
    ) -> int:
        """Makes the changes that `routing.plan` says. The revision of the task's routing, afterwards.

        Raises RoutingChangedError if it is not `expected` before, TaskNotFoundError, VersionNotFoundError,
        IllegalTransitionError, CurrentVersionInUseError.
        """
        ...

    def revision(self) -> int: ...

    def state(self) -> RoutingState: ...

    def task(self, task: str) -> TaskRoute:
        """Raises TaskNotFoundError."""
        ...

    def version(self, task: str, version: int) -> VersionRecord:
        """Raises TaskNotFoundError, VersionNotFoundError."""
        ...

    def digests(self) -> frozenset[str]:
        """Of every adapter whose files some version needs: any that is not deleted."""
        ...

    def idle(self) -> tuple[Idle, ...]:
        """What may be deleted to make room: retired and failed versions, those that are so longest first."""
        ...

    def dump(self) -> Snapshot:
        """Everything, at one revision."""
        ...

    def load(self, loaded: Snapshot) -> None:
        """Everything that `dump` gave, revisions and all. Raises NotEmptyError if there is a task already."""
        ...

    def warnings(self) -> tuple[str, ...]:
        """Why what is acknowledged might not last, in words for an operator; none if it does."""
        ...

    def close(self) -> None: ...
