"""Tables of the SQLite store, and how an older program's become these. One line of history, one revision."""

import sqlite3

from adapter_registry.errors import CannotStartError

SCHEMA = 2

TABLES = """
CREATE TABLE tasks (
    task TEXT PRIMARY KEY,
    current INTEGER,
    routing_revision INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE adapters (
    digest TEXT PRIMARY KEY,
    method TEXT NOT NULL,
    base TEXT NOT NULL,
    record TEXT NOT NULL,
    files TEXT NOT NULL,
    tensors INTEGER NOT NULL,
    tensor_bytes INTEGER NOT NULL
) STRICT;
CREATE TABLE versions (
    task TEXT NOT NULL REFERENCES tasks,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL REFERENCES adapters,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    pushed_at TEXT NOT NULL,
    PRIMARY KEY (task, version)
) STRICT;
CREATE TABLE history (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    task TEXT NOT NULL,
    version INTEGER NOT NULL,
    event TEXT NOT NULL,
    before TEXT,
    after TEXT NOT NULL,
    current INTEGER,
    at TEXT NOT NULL,
    replica TEXT NOT NULL,
    reason TEXT NOT NULL,
    FOREIGN KEY (task, version) REFERENCES versions
) STRICT;
CREATE INDEX history_of_version ON history (task, version);
"""


MIGRATIONS = {
    1: """
ALTER TABLE tasks ADD COLUMN routing_revision INTEGER NOT NULL DEFAULT 0;
UPDATE tasks SET routing_revision = coalesce(
    (SELECT max(revision) FROM history h WHERE h.task = tasks.task AND h.event IN ('promote', 'retire')), 0
);
"""
}
"""What makes the next schema of this one."""


def prepare(connection: sqlite3.Connection) -> None:
    """Creates the tables, or migrates them. Raises CannotStartError for a database of a newer schema."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    require_known("database", found, SCHEMA)
    if found == 0:
        _run(connection, TABLES, SCHEMA)
    for schema in range(found or SCHEMA, SCHEMA):
        _run(connection, MIGRATIONS[schema], schema + 1)


def require_known(what: str, found: int, known: int) -> None:
    """Raises CannotStartError if a program newer than this one wrote it."""
    if found > known:
        raise CannotStartError(
            f"the registry's {what} has schema {found}, this program knows {known} and older: a newer PrAd "
            "server wrote it. Run that one or a newer one; or export from it (prad registry export FILE), "
            "and import the file with this one into an empty registry"
        )


def _run(connection: sqlite3.Connection, script: str, schema: int) -> None:
    """One script is one transaction: killed half-way, the next start finds what was there before."""
    connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {schema}; COMMIT;")
