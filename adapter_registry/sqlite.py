"""The store in one SQLite file: one connection, one lock, every method one transaction."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from adapter_registry import rows, schema
from adapter_registry.api import RoutingState, TaskRoute, VersionRecord
from adapter_registry.errors import CannotStartError, VersionNotFoundError
from adapter_registry.routing import Change, TaskView, plan
from adapter_registry.snapshot import Snapshot, require_empty, snapshot
from adapter_registry.store import Idle, StoredAdapter
from adapter_registry.versions import Event, State

_HISTORY = """
    INSERT INTO history (task, version, event, before, after, current, at, replica, reason)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


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
            raise CannotStartError(f"cannot open {path}: {error}") from error
        self._connection.row_factory = sqlite3.Row
        try:
            schema.prepare(self._connection)
        except sqlite3.Error as error:
            self.close()
            raise CannotStartError(f"cannot use {path}: {error}") from error
        except CannotStartError:
            self.close()
            raise

    def push(self, task: str, adapter: StoredAdapter) -> tuple[int, bool]:
        with self._transaction("IMMEDIATE") as db:
            db.execute("INSERT OR IGNORE INTO tasks (task) VALUES (?)", (task,))
            known = db.execute(
                "SELECT max(version) FROM versions WHERE task = ? AND digest = ? AND state NOT IN (?, ?)",
                (task, adapter.digest, State.RETIRED, State.DELETED),
            ).fetchone()[0]
            if known is not None:
                self._write(db, task, plan(rows.view(db, task), known, Event.PUSH))
                return int(known), False
            number = (
                1
                + db.execute(
                    "SELECT coalesce(max(version), 0) FROM versions WHERE task = ?", (task,)
                ).fetchone()[0]
            )
            _insert_adapter(db, adapter)
            now = self._now()
            db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, '', ?)",
                (task, number, adapter.digest, State.PUSHED, now),
            )
            current = rows.view(db, task).current
            db.execute(_HISTORY, (task, number, Event.PUSH, None, State.PUSHED, current, now, "", ""))
            return int(number), True

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
        with self._transaction("IMMEDIATE") as db:
            changes = plan(rows.view(db, task), version, event, force=force, expected=expected)
            self._write(db, task, changes, replica=replica, reason=reason)
            return rows.view(db, task).revision

    def revision(self) -> int:
        with self._transaction() as db:
            return rows.revision(db)

    def state(self) -> RoutingState:
        with self._transaction() as db:
            found = db.execute(f"{rows.ROUTES} ORDER BY t.task, v.version").fetchall()
            revision = rows.revision(db)
        tasks = (rows.task_route(list(group)) for _, group in groupby(found, key=lambda row: row["task"]))
        return RoutingState(revision=revision, tasks=tuple(tasks))

    def task(self, task: str) -> TaskRoute:
        with self._transaction() as db:
            found = db.execute(f"{rows.ROUTES} WHERE t.task = ? ORDER BY v.version", (task,)).fetchall()
        if not found:
            raise rows.no_task(task)
        return rows.task_route(found)

    def version(self, task: str, version: int) -> VersionRecord:
        with self._transaction() as db:
            return _version(db, rows.view(db, task), version)

    def digests(self) -> frozenset[str]:
        with self._transaction() as db:
            found = db.execute("SELECT DISTINCT digest FROM versions WHERE state != ?", (State.DELETED,))
            return frozenset(row[0] for row in found)

    def idle(self) -> tuple[Idle, ...]:
        with self._transaction() as db:
            return tuple(map(rows.idle, db.execute(rows.IDLE, (*rows.IDLE_STATES, *rows.GONE_STATES))))

    def dump(self) -> Snapshot:
        with self._transaction() as db:
            found = db.execute(f"{rows.ROUTES} ORDER BY t.task, v.version").fetchall()
            tasks = [rows.task_route(list(group)) for _, group in groupby(found, key=lambda row: row["task"])]
            return snapshot(rows.revision(db), ((task, _versions(db, task)) for task in tasks))

    def load(self, loaded: Snapshot) -> None:
        with self._transaction("IMMEDIATE") as db:
            require_empty(db.execute("SELECT count(*) FROM tasks").fetchone()[0])
            for task in loaded.tasks:
                routing = (task.task, task.current, task.routing_revision)
                db.execute("INSERT INTO tasks (task, current, routing_revision) VALUES (?, ?, ?)", routing)
            for each in loaded.versions:
                adapter = StoredAdapter(each.digest, each.record, each.files, each.tensors, each.tensor_bytes)
                _insert_adapter(db, adapter)
                version = (each.task, each.version, each.digest, each.state, each.reason, each.pushed_at)
                db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", version)
            for each, line in loaded.lines:
                moved = (line.event, line.before, line.after, line.current)
                row = (line.revision, each.task, each.version, *moved, line.at, line.replica, line.reason)
                db.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

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

    def _write(
        self,
        db: sqlite3.Connection,
        task: str,
        changes: tuple[Change, ...],
        *,
        replica: str = "",
        reason: str = "",
    ) -> None:
        for change in changes:
            why = (change.event is Event.DELETE, reason)  # what is deleted goes on saying why it had failed
            db.execute(
                "UPDATE versions SET state = ?, reason = CASE WHEN ? THEN reason ELSE ? END"
                " WHERE task = ? AND version = ?",
                (change.after, *why, task, change.version),
            )
            moved = (change.event, change.before, change.after, change.current)
            line = db.execute(_HISTORY, (task, change.version, *moved, self._now(), replica, reason))
            db.execute("UPDATE tasks SET current = ? WHERE task = ?", (change.current, task))
            if change.event.reroutes:
                db.execute("UPDATE tasks SET routing_revision = ? WHERE task = ?", (line.lastrowid, task))


def _versions(db: sqlite3.Connection, task: TaskRoute) -> list[VersionRecord]:
    view = rows.view(db, task.task)
    return [_version(db, view, version.version) for version in task.versions]


def _version(db: sqlite3.Connection, view: TaskView, version: int) -> VersionRecord:
    if version not in view.states:
        raise VersionNotFoundError(f"{view.task} has no version {version}", param="version")
    row = db.execute(
        "SELECT * FROM versions JOIN adapters USING (digest) WHERE task = ? AND version = ?",
        (view.task, version),
    ).fetchone()
    history = db.execute(
        "SELECT * FROM history WHERE task = ? AND version = ? ORDER BY revision", (view.task, version)
    ).fetchall()
    return rows.version_record(row, view.current == version, history)


def _insert_adapter(db: sqlite3.Connection, adapter: StoredAdapter) -> None:
    db.execute(
        "INSERT OR IGNORE INTO adapters VALUES (?, ?, ?, ?, ?, ?, ?)",
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
