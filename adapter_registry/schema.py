"""The tables of the SQLite store. One line of history is one revision."""

import sqlite3

from adapter_registry.errors import CannotStartError

SCHEMA = 1

TABLES = """
CREATE TABLE tasks (
    task TEXT PRIMARY KEY,
    current INTEGER
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


def prepare(connection: sqlite3.Connection) -> None:
    """Creates the tables where there are none. Raises CannotStartError for a database of another schema."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found == 0:
        # One script is one transaction: killed half-way, the next start finds an empty database.
        connection.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
    elif found != SCHEMA:
        raise CannotStartError(f"the registry's database has schema {found}, this program knows {SCHEMA}")
