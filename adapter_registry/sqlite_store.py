"""The store in one SQLite file: one connection, one lock, every method one transaction."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from adapter_registry import sqlite_rows as rows
from adapter_registry import sqlite_schema as schema
from adapter_registry.errors import CannotStartError
from adapter_registry.keys import NewKey, StoredKey, issued, of_the_api, revoked
from adapter_registry.messages import HistoryLine, LoggedLine, RoutingState, TaskRoute, VersionRecord
from adapter_registry.planning import Change, Move, TaskView, Wanted, plan
from adapter_registry.routing import Routing
from adapter_registry.snapshot import Snapshot, require_empty, snapshot
from adapter_registry.store import MOST_CHANGES, Idle, StoredAdapter, all_signatures, history_line
from adapter_registry.versions import Event, State

_MEND = "move it away and read a copy back (prad registry import), or choose another data_dir"


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class SqliteStore:
    """Implements `store.Store`. Raises CannotStartError if `path` cannot be used."""

    def __init__(self, path: Path, *, now: Callable[[], str] = utc_now) -> None:
        self._now = now
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise CannotStartError(f"cannot open {path}: {error}; {_MEND}") from error
        self._connection.row_factory = sqlite3.Row
        try:
            schema.prepare(self._connection)
        except sqlite3.Error as error:
            self.close()
            raise CannotStartError(f"cannot use {path}: {error}; {_MEND}") from error
        except CannotStartError:
            self.close()
            raise

    def push(self, task: str, adapter: StoredAdapter, *, by: str = "", source: str = "") -> tuple[int, bool]:
        with self._transaction("IMMEDIATE") as db:
            unrouted = schema.stored(Routing())
            db.execute("INSERT OR IGNORE INTO tasks (task, routing) VALUES (?, ?)", (task, unrouted))
            known = db.execute(
                "SELECT max(version) FROM versions WHERE task = ? AND digest = ? AND state NOT IN (?, ?)",
                (task, adapter.digest, State.RETIRED, State.DELETED),
            ).fetchone()[0]
            if known is not None:
                _insert_adapter(db, adapter)
                self._change(db, task, Move(known, Event.PUSH), by=by, reason=source)
                return int(known), False
            number = (
                1
                + db.execute(
                    "SELECT coalesce(max(version), 0) FROM versions WHERE task = ?", (task,)
                ).fetchone()[0]
            )
            _insert_adapter(db, adapter)
            db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, '', ?, 0)",
                (task, number, adapter.digest, State.PUSHED, self._now()),
            )
            self._write_line(db, task, Change(number, Event.PUSH, None, State.PUSHED), by, source)
            return int(number), True

    def change(
        self, task: str, wanted: Wanted, *, expected: int | None = None, by: str = "", reason: str = ""
    ) -> TaskRoute:
        with self._transaction("IMMEDIATE") as db:
            self._change(db, task, wanted, expected=expected, by=by, reason=reason)
            return _task(db, task)

    def revision(self) -> int:
        with self._transaction() as db:
            return rows.revision(db)

    def state(self) -> RoutingState:
        with self._transaction() as db:
            revision, found, keys = rows.revision(db), rows.routes(db), rows.keys(db)
            mark = rows.mark(db, revision)
        tasks = rows.task_routes(found)
        return RoutingState(revision=revision, tasks=tasks, keys=of_the_api(keys), mark=mark)

    def changed(self, after: int, mark: str) -> RoutingState | None:
        with self._transaction() as db:
            revision = rows.revision(db)
            if not mark or not 0 <= revision - after <= MOST_CHANGES or rows.mark(db, after) != mark:
                return None
            same = not rows.keys_changed(db, after)
            return RoutingState(
                revision=revision,
                tasks=rows.task_routes(rows.routes(db, after)),
                keys=None if same else of_the_api(rows.keys(db)),
                mark=rows.mark(db, revision),
                since=after,
                same_keys=same,
            )

    def task(self, task: str) -> TaskRoute:
        with self._transaction() as db:
            return _task(db, task)

    def version(self, task: str, version: int) -> VersionRecord:
        with self._transaction() as db:
            return _version(db, rows.view(db, task), version)

    def history(self, task: str, latest: int | None = None) -> tuple[HistoryLine, ...]:
        with self._transaction() as db:
            rows.view(db, task)
            return rows.history(db, "task = ?", (task,), latest)

    def log(self, latest: int) -> tuple[LoggedLine, ...]:
        with self._transaction() as db:
            found = db.execute("SELECT * FROM history ORDER BY revision DESC LIMIT ?", (latest,)).fetchall()
        return rows.logged(reversed(found))

    def log_since(self, after: int, upto: int, most: int) -> tuple[tuple[LoggedLine, ...], int]:
        asked = "SELECT * FROM history WHERE revision > ? AND revision <= ? ORDER BY revision LIMIT ?"
        with self._transaction() as db:
            found = db.execute(asked, (after, upto, most)).fetchall()
        return rows.logged(found), found[-1]["revision"] if len(found) == most else upto

    def add_key(self, new: NewKey, sha256: str, *, by: str = "") -> StoredKey:
        with self._transaction("IMMEDIATE") as db:
            known, revision = rows.key(db, new.name), rows.revision(db) + 1
            key = issued(known, new, sha256, revision, self._now(), by)
            _put_key(db, key)
            return key

    def revoke_key(self, name: str, *, by: str = "") -> StoredKey:
        with self._transaction("IMMEDIATE") as db:
            key = revoked(rows.key(db, name), name, rows.revision(db) + 1, self._now(), by)
            _put_key(db, key)
            return key

    def keys(self) -> tuple[StoredKey, ...]:
        with self._transaction() as db:
            return rows.keys(db)

    def digests(self) -> frozenset[str]:
        with self._transaction() as db:
            found = db.execute("SELECT DISTINCT digest FROM versions WHERE state != ?", (State.DELETED,))
            return frozenset(row[0] for row in found)

    def idle(self) -> tuple[Idle, ...]:
        with self._transaction() as db:
            return tuple(map(rows.idle, db.execute(rows.IDLE, (*rows.IDLE_STATES, *rows.GONE_STATES))))

    def dump(self) -> Snapshot:
        with self._transaction() as db:
            tasks = rows.task_routes(rows.routes(db))
            return snapshot(
                rows.revision(db),
                ((task, _versions(db, task), _without_version(db, task)) for task in tasks),
                rows.keys(db),
            )

    def load(self, loaded: Snapshot) -> None:
        with self._transaction("IMMEDIATE") as db:
            require_empty(
                db.execute("SELECT count(*) FROM tasks").fetchone()[0],
                db.execute("SELECT count(*) FROM keys").fetchone()[0],
            )
            for task in loaded.tasks:
                routing = schema.stored(task.routing)
                db.execute("INSERT INTO tasks (task, routing) VALUES (?, ?)", (task.task, routing))
            for each in loaded.versions:
                known = (each.digest, each.record, each.files, each.tensors, each.tensor_bytes)
                adapter = StoredAdapter(*known, each.signatures)
                _insert_adapter(db, adapter)
                version = (each.task, each.version, each.digest, each.state, each.reason, each.pushed_at)
                db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)", (*version, each.warmed))
            for name, line in loaded.lines:
                _insert_line(db, name, line)
            for key in loaded.keys:
                _put_key(db, key)

    def warnings(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self, kind: str = "DEFERRED") -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite ends one itself when the disk is full
                    self._connection.execute("ROLLBACK")
                raise

    def _change(
        self,
        db: sqlite3.Connection,
        task: str,
        wanted: Wanted,
        *,
        expected: int | None = None,
        by: str = "",
        reason: str = "",
    ) -> None:
        view = rows.view(db, task)
        for change in plan(view, wanted, lambda revision: rows.past(db, task, revision), expected=expected):
            # what is deleted goes on saying why it had failed; that of a push is where the files were fetched
            why = (change.event is Event.DELETE, "" if change.event is Event.PUSH else reason)
            db.execute(
                "UPDATE versions SET state = ?, reason = CASE WHEN ? THEN reason ELSE ? END"
                " WHERE task = ? AND version = ?",
                (change.after, *why, task, change.version),
            )
            line = self._write_line(db, task, change, by, reason)
            if line.event is Event.WARM:
                warmed = (line.revision, task, line.version)
                db.execute("UPDATE versions SET warmed = ? WHERE task = ? AND version = ?", warmed)
            if line.routing is not None:
                db.execute("UPDATE tasks SET routing = ? WHERE task = ?", (schema.stored(line.routing), task))

    def _write_line(
        self, db: sqlite3.Connection, task: str, change: Change, by: str, reason: str
    ) -> HistoryLine:
        line = history_line(change, rows.revision(db) + 1, at=self._now(), by=by, reason=reason)
        _insert_line(db, task, line)
        return line


def _task(db: sqlite3.Connection, task: str) -> TaskRoute:
    found = db.execute(f"{rows.ROUTES} WHERE t.task = ? ORDER BY v.version", (task,)).fetchall()
    if not found:
        raise rows.no_task(task)
    return rows.task_route(found)


def _insert_line(db: sqlite3.Connection, task: str, line: HistoryLine) -> None:
    routing = None if line.routing is None else schema.stored(line.routing)
    db.execute(schema.HISTORY, {**line.model_dump(), "task": task, "routing": routing})


def _put_key(db: sqlite3.Connection, key: StoredKey) -> None:
    found = (key.name, key.revision, key.model_dump_json())
    db.execute("INSERT OR REPLACE INTO keys (name, revision, key) VALUES (?, ?, ?)", found)


def _without_version(db: sqlite3.Connection, task: TaskRoute) -> tuple[HistoryLine, ...]:
    """Changes of no version."""
    return rows.history(db, "task = ? AND version IS NULL", (task.task,))


def _versions(db: sqlite3.Connection, task: TaskRoute) -> list[VersionRecord]:
    view = rows.view(db, task.task)
    return [_version(db, view, version.version) for version in task.versions]


def _version(db: sqlite3.Connection, view: TaskView, version: int) -> VersionRecord:
    view.state(version)
    row = db.execute(
        "SELECT * FROM versions JOIN adapters USING (digest) WHERE task = ? AND version = ?",
        (view.task, version),
    ).fetchone()
    history = rows.history(db, "task = ? AND version = ?", (view.task, version))
    return rows.version_record(row, version in view.routing.split, history)


def _insert_adapter(db: sqlite3.Connection, adapter: StoredAdapter) -> None:
    db.execute(
        "INSERT OR IGNORE INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?, '[]')",
        (
            adapter.digest,
            adapter.record.method,
            adapter.record.base.model_dump_json(),
            adapter.record.model_dump_json(),
            json.dumps([file.model_dump() for file in adapter.files]),
            adapter.tensors,
            adapter.tensor_bytes,
        ),
    )
    if not adapter.signatures:
        return
    known = db.execute("SELECT signatures FROM adapters WHERE digest = ?", (adapter.digest,)).fetchone()
    signatures = all_signatures(rows.signatures(known), adapter.signatures)
    text = json.dumps([each.model_dump() for each in signatures])
    db.execute("UPDATE adapters SET signatures = ? WHERE digest = ?", (text, adapter.digest))
