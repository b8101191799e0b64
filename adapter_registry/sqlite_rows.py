"""Reading the SQLite store: rows become the types of `messages.py`."""

import json
import sqlite3
from collections.abc import Iterable
from itertools import groupby

from adapter_registry.errors import TaskNotFoundError
from adapter_registry.keys import StoredKey, in_order
from adapter_registry.messages import (
    HistoryLine,
    LoggedLine,
    SignedBy,
    StoredFile,
    TaskRoute,
    VersionRecord,
    VersionRoute,
)
from adapter_registry.planning import TaskView
from adapter_registry.routing import Routing
from adapter_registry.store import Idle, key_mark, line_mark
from adapter_registry.versions import State
from prad.artefact import AdapterRecord, BaseModelRef

ROUTES = """
    SELECT t.task, t.routing, v.version, v.state, v.digest, v.pushed_at, v.warmed, a.method, a.base
    FROM tasks t JOIN versions v USING (task) JOIN adapters a USING (digest)
"""

IDLE_STATES = (State.RETIRED, State.FAILED)
GONE_STATES = (*IDLE_STATES, State.DELETED)
IDLE = """
    SELECT v.task, v.version, v.digest, a.files, max(h.revision) AS since
    FROM versions v JOIN adapters a USING (digest) JOIN history h USING (task, version)
    WHERE v.state IN (?, ?)
    AND NOT EXISTS (SELECT 1 FROM versions o WHERE o.digest = v.digest AND o.state NOT IN (?, ?, ?))
    GROUP BY v.task, v.version ORDER BY since
"""
"""With `IDLE_STATES`, then `GONE_STATES`: whose files no version needs that answers, or may come to."""


def no_task(task: str) -> TaskNotFoundError:
    return TaskNotFoundError(
        f"there is no task {task!r}; prad adapter list shows those there are", param="task"
    )


def revision(db: sqlite3.Connection) -> int:
    """Of the last change, of whatever kind."""
    return int(
        db.execute(
            "SELECT max((SELECT coalesce(max(revision), 0) FROM history),"
            " (SELECT coalesce(max(revision), 0) FROM keys))"
        ).fetchone()[0]
    )


def mark(db: sqlite3.Connection, revision: int) -> str:
    """Of the change of that revision; empty if it is not known: of a key, later ones take its place."""
    line = db.execute("SELECT * FROM history WHERE revision = ?", (revision,)).fetchone()
    if line is not None:
        return line_mark(line["task"], _line(line))
    found = db.execute("SELECT key FROM keys WHERE revision = ?", (revision,)).fetchone()
    return "" if found is None else key_mark(StoredKey.model_validate_json(found[0]))


def routes(db: sqlite3.Connection, after: int | None = None) -> list[sqlite3.Row]:
    """Of all tasks, or of those that changed since a revision."""
    if after is None:
        return db.execute(f"{ROUTES} ORDER BY t.task, v.version").fetchall()
    changed = "WHERE t.task IN (SELECT task FROM history WHERE revision > ?)"
    return db.execute(f"{ROUTES} {changed} ORDER BY t.task, v.version", (after,)).fetchall()


def task_routes(found: list[sqlite3.Row]) -> tuple[TaskRoute, ...]:
    """By name."""
    return tuple(task_route(list(group)) for _, group in groupby(found, key=lambda row: row["task"]))


def keys_changed(db: sqlite3.Connection, after: int) -> bool:
    return db.execute("SELECT 1 FROM keys WHERE revision > ?", (after,)).fetchone() is not None


def keys(db: sqlite3.Connection) -> tuple[StoredKey, ...]:
    return in_order(StoredKey.model_validate_json(row[0]) for row in db.execute("SELECT key FROM keys"))


def key(db: sqlite3.Connection, name: str) -> StoredKey | None:
    found = db.execute("SELECT key FROM keys WHERE name = ?", (name,)).fetchone()
    return None if found is None else StoredKey.model_validate_json(found[0])


def view(db: sqlite3.Connection, task: str) -> TaskView:
    rows = db.execute("SELECT version, state FROM versions WHERE task = ?", (task,)).fetchall()
    if not rows:
        raise no_task(task)
    found = db.execute("SELECT routing FROM tasks WHERE task = ?", (task,)).fetchone()
    states = {row["version"]: State(row["state"]) for row in rows}
    return TaskView(task, Routing.model_validate_json(found["routing"]), states)


def past(db: sqlite3.Connection, task: str, revision: int) -> Routing | None:
    """The routing that the task's change of a revision made."""
    found = db.execute(
        "SELECT routing FROM history WHERE task = ? AND revision = ?", (task, revision)
    ).fetchone()
    return None if found is None or found[0] is None else Routing.model_validate_json(found[0])


def history(
    db: sqlite3.Connection, where: str, values: tuple[object, ...], latest: int | None = None
) -> tuple[HistoryLine, ...]:
    """In order; `latest`: only so many of the last."""
    asked = f"SELECT * FROM history WHERE {where} ORDER BY revision DESC LIMIT ?"
    found = db.execute(asked, (*values, -1 if latest is None else latest)).fetchall()
    return tuple(map(_line, reversed(found)))


def logged(found: Iterable[sqlite3.Row]) -> tuple[LoggedLine, ...]:
    """To be called without the lock: it takes its time."""
    return tuple(LoggedLine(**dict(_line(row)), task=row["task"]) for row in found)


def _line(row: sqlite3.Row) -> HistoryLine:
    made = None if row["routing"] is None else Routing.model_validate_json(row["routing"])
    return HistoryLine.model_validate({**dict(row), "routing": made})


def task_route(rows: list[sqlite3.Row]) -> TaskRoute:
    versions = (
        VersionRoute(
            version=row["version"],
            state=State(row["state"]),
            digest=row["digest"],
            method=row["method"],
            base=BaseModelRef.model_validate_json(row["base"]),
            pushed_at=row["pushed_at"],
            warmed=row["warmed"],
        )
        for row in rows
    )
    first = rows[0]
    return TaskRoute(
        task=first["task"],
        routing=Routing.model_validate_json(first["routing"]),
        versions=tuple(versions),
    )


def idle(row: sqlite3.Row) -> Idle:
    nbytes = sum(file["size"] for file in json.loads(row["files"]))
    return Idle(row["task"], row["version"], row["digest"], nbytes)


def signatures(row: sqlite3.Row) -> tuple[SignedBy, ...]:
    return tuple(SignedBy.model_validate(each) for each in json.loads(row["signatures"]))


def version_record(row: sqlite3.Row, current: bool, history: tuple[HistoryLine, ...]) -> VersionRecord:
    return VersionRecord(
        task=row["task"],
        version=row["version"],
        state=State(row["state"]),
        current=current,
        digest=row["digest"],
        reason=row["reason"],
        pushed_at=row["pushed_at"],
        record=AdapterRecord.model_validate_json(row["record"]),
        files=tuple(StoredFile(**file) for file in json.loads(row["files"])),
        tensors=row["tensors"],
        tensor_bytes=row["tensor_bytes"],
        signatures=signatures(row),
        history=history,
    )
