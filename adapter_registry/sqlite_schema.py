"""Tables of the SQLite store, and how an older program's become these. One line of history, one revision."""

import sqlite3
from collections.abc import Callable, Mapping

from adapter_registry.errors import CannotStartError
from adapter_registry.routing import Routing
from adapter_registry.upgrading import upgraded

SCHEMA = 4

TABLES = """
CREATE TABLE tasks (
    task TEXT PRIMARY KEY,
    routing TEXT NOT NULL
) STRICT;
CREATE TABLE adapters (
    digest TEXT PRIMARY KEY,
    method TEXT NOT NULL,
    base TEXT NOT NULL,
    record TEXT NOT NULL,
    files TEXT NOT NULL,
    tensors INTEGER NOT NULL,
    tensor_bytes INTEGER NOT NULL,
    signatures TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE TABLE versions (
    task TEXT NOT NULL REFERENCES tasks,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL REFERENCES adapters,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    pushed_at TEXT NOT NULL,
    warmed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (task, version)
) STRICT;
CREATE TABLE history (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    task TEXT NOT NULL REFERENCES tasks,
    version INTEGER,
    event TEXT NOT NULL,
    before TEXT,
    after TEXT,
    routing TEXT,
    at TEXT NOT NULL,
    by TEXT NOT NULL,
    reason TEXT NOT NULL,
    FOREIGN KEY (task, version) REFERENCES versions
) STRICT;
CREATE INDEX history_of_version ON history (task, version);
"""

KEYS = """
CREATE TABLE keys (
    name TEXT PRIMARY KEY,
    revision INTEGER NOT NULL UNIQUE,
    key TEXT NOT NULL
) STRICT;
"""


def _keep_routing_revisions(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE tasks ADD COLUMN routing_revision INTEGER NOT NULL DEFAULT 0")


def _keep_routings(connection: sqlite3.Connection) -> None:
    """In place of a current version: what it was after each change follows from the history."""
    names = ("revision", "task", "version", "event", "before", "after", "current", "at", "replica", "reason")
    found = connection.execute(f"SELECT {', '.join(names)} FROM history ORDER BY revision").fetchall()
    of: dict[str, list[dict[str, object]]] = {}
    for row in found:
        line = dict(zip(names, row, strict=True))
        of.setdefault(str(line["task"]), []).append(line)
    tasks = [row[0] for row in connection.execute("SELECT task FROM tasks").fetchall()]
    connection.execute("DROP TABLE history")
    connection.execute("ALTER TABLE tasks ADD COLUMN routing TEXT NOT NULL DEFAULT ''")
    for column in ("current", "routing_revision"):
        connection.execute(f"ALTER TABLE tasks DROP COLUMN {column}")
    _run(connection, TABLES[TABLES.index("CREATE TABLE history") :])
    for task in tasks:
        lines, routing = upgraded(of.get(task, []))
        connection.execute("UPDATE tasks SET routing = ? WHERE task = ?", (stored(routing), task))
        for line in lines:
            made = {**line, "routing": None if line["routing"] is None else stored(line["routing"])}
            connection.execute(HISTORY, made)


def _keep_signatures_warmings_and_keys(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE adapters ADD COLUMN signatures TEXT NOT NULL DEFAULT '[]'")
    connection.execute("ALTER TABLE versions ADD COLUMN warmed INTEGER NOT NULL DEFAULT 0")
    _run(connection, KEYS)


HISTORY = """
    INSERT INTO history (revision, task, version, event, before, after, routing, at, by, reason)
    VALUES (:revision, :task, :version, :event, :before, :after, :routing, :at, :by, :reason)
"""

MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {
    1: _keep_routing_revisions,
    2: _keep_routings,
    3: _keep_signatures_warmings_and_keys,
}
"""What makes the next schema of this one."""


def stored(routing: Routing) -> str:
    return routing.model_dump_json(exclude={"default"})


def prepare(connection: sqlite3.Connection) -> None:
    """Creates the tables, or migrates them. Raises CannotStartError for a database of a newer schema."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    require_known("database", found, SCHEMA)
    if found < SCHEMA:
        _become_todays(connection, found)


def require_known(what: str, found: int, known: int) -> None:
    """Raises CannotStartError if a program newer than this one wrote it."""
    if found > known:
        raise CannotStartError(
            f"the registry's {what} has schema {found}, this program knows {known} and older: a newer PrAd "
            "server wrote it. Run that one or a newer one; or export from it (prad registry export FILE), "
            "and import the file with this one into an empty registry"
        )


def _become_todays(connection: sqlite3.Connection, schema: int) -> None:
    """One transaction: killed half-way, the next start finds what was there before."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if schema == 0:
            _run(connection, TABLES + KEYS)
        for older in range(schema or SCHEMA, SCHEMA):
            MIGRATIONS[older](connection)
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _run(connection: sqlite3.Connection, statements: str) -> None:
    """As executescript, which would commit what is under way."""
    for statement in filter(str.strip, statements.split(";")):
        connection.execute(statement)
