"""What the registry needs from a database: the cut behind which SQLite and Redis stand.

Every method is one transaction, is called from worker threads, and leaves the store as it was if it raises
(but see StoreUnavailableError). The files of an adapter lie elsewhere (`artefacts.py`), and are there before
`push` is called.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from adapter_registry.keys import NewKey, StoredKey
from adapter_registry.messages import (
    HistoryLine,
    LoggedLine,
    RoutingState,
    SignedBy,
    StoredFile,
    TaskRoute,
    VersionRecord,
)
from adapter_registry.planning import Change, Wanted
from adapter_registry.snapshot import Snapshot
from prad.artefact import AdapterRecord
from prad.artefact.signatures import MAX_SIGNATURES

MOST_CHANGES = 1000
"""Who is further behind is told everything."""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A checked adapter whose files are stored under their digest, and who signed it."""

    digest: str
    record: AdapterRecord
    files: tuple[StoredFile, ...]
    tensors: int
    tensor_bytes: int
    signatures: tuple[SignedBy, ...] = ()


@dataclass(frozen=True, slots=True)
class Idle:
    """A version that answers nothing any more, whose files no version needs that does or may."""

    task: str
    version: int
    digest: str
    nbytes: int


def history_line(change: Change, revision: int, *, at: str, by: str, reason: str) -> HistoryLine:
    """The change as the line of history that both stores keep, under its revision."""
    routing = None if change.routing is None else change.routing.at(revision)
    return HistoryLine(
        revision=revision,
        version=change.version,
        event=change.event,
        before=change.before,
        after=change.after,
        routing=routing,
        at=at,
        by=by,
        reason=reason,
    )


def line_mark(task: str, line: HistoryLine) -> str:
    """Of a change: no other that could have come in its place has the same, after data were lost."""
    return _mark(task, line.version, line.event.value, line.at, line.by, line.reason)


def key_mark(key: StoredKey) -> str:
    """Likewise, of the last change of a key."""
    return _mark(key.name, key.sha256, key.created_at, key.revoked_at)


def _mark(*parts: object) -> str:
    return sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def all_signatures(known: Iterable[SignedBy], more: Iterable[SignedBy]) -> tuple[SignedBy, ...]:
    """One by each key, at most `MAX_SIGNATURES`: those with a name first, which an earlier one may get."""
    found: dict[str, SignedBy] = {}
    for each in (*known, *more):
        if each.name or each.key not in found:
            found[each.key] = each
    return tuple(sorted(found.values(), key=lambda each: not each.name)[:MAX_SIGNATURES])


class Store(Protocol):
    """Tasks, versions, history, keys. `revision` grows with every change and never goes back.

    Every method but `close` raises StoreUnavailableError if the database is another program that does not
    answer now. Whether a change that it was asked for was made is not known then.
    """

    def push(self, task: str, adapter: StoredAdapter, *, by: str = "", source: str = "") -> tuple[int, bool]:
        """The version number of these files, and whether it is new. `source`: where they were fetched, for
        the history; empty: they came with the push.

        Files that already are a version of this task, neither retired nor deleted, get that one's number.
        Signatures are kept beside those of whoever signed the same files before.
        """
        ...

    def change(
        self, task: str, wanted: Wanted, *, expected: int | None = None, by: str = "", reason: str = ""
    ) -> TaskRoute:
        """Makes the changes that `planning.plan` says; the task afterwards. `by`: who asks, for the history.

        Raises what `plan` raises, TaskNotFoundError.
        """
        ...

    def revision(self) -> int: ...

    def state(self) -> RoutingState: ...

    def changed(self, after: int, mark: str) -> RoutingState | None:
        """What changed since the revision `after`, whose change has that mark. None if there was no such
        change, data were lost since, or it is more than `MOST_CHANGES` ago: then everything is to be told."""
        ...

    def task(self, task: str) -> TaskRoute:
        """Raises TaskNotFoundError."""
        ...

    def version(self, task: str, version: int) -> VersionRecord:
        """Raises TaskNotFoundError, VersionNotFoundError."""
        ...

    def history(self, task: str, latest: int | None = None) -> tuple[HistoryLine, ...]:
        """The `latest` changes of the task, of its versions and of its routing, in order; None: every one.

        Raises TaskNotFoundError.
        """
        ...

    def log(self, latest: int) -> tuple[LoggedLine, ...]:
        """The `latest` changes of all tasks, in order, as far as they are known in one place: Redis has some
        10,000 of them there."""
        ...

    def log_since(self, after: int, upto: int, most: int) -> tuple[tuple[LoggedLine, ...], int]:
        """The first `most` changes of the log after a revision and up to another, in order; and the revision
        up to which these are all: `upto`, unless there may be more."""
        ...

    def add_key(self, new: NewKey, sha256: str, *, by: str = "") -> StoredKey:
        """A key of the token with that hash; `by`: who asks. Raises KeyExistsError."""
        ...

    def revoke_key(self, name: str, *, by: str = "") -> StoredKey:
        """The key, revoked now or before. Raises KeyNotFoundError."""
        ...

    def keys(self) -> tuple[StoredKey, ...]:
        """All there ever were, in the order in which they were made."""
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
        """Everything that `dump` gave, revisions and all. Raises NotEmptyError if anything is there."""
        ...

    def warnings(self) -> tuple[str, ...]:
        """Why what is acknowledged might not last, in words for an operator; none if it does."""
        ...

    def close(self) -> None: ...
