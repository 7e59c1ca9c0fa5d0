"""The file of a run folder that holds its replies and, while it is written, its lock. No torch.

One SQLite file, written ahead (WAL) and synced at every commit. One program writes at a time; its
lock is the operating system's and dies with it. `evaluate/store.py` says what is in the file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cwdpo_bench.errors import UserError

FILE = "replies.sqlite"
_APPLICATION = 0x43574450
"""Stands in the file's header and tells it from any other SQLite file."""
SCHEMA = 1
"""Of the tables; raised when they change."""

_TABLES = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE replies (key BLOB PRIMARY KEY, task TEXT NOT NULL, sample TEXT NOT NULL, "
    "reply BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE timings (task TEXT NOT NULL, samples INTEGER NOT NULL, seconds REAL NOT NULL)",
)


@contextmanager
def locked(folder: Path) -> Iterator[sqlite3.Connection]:
    """A run folder's file, open and locked until the block ends; made where it is missing.

    A file in which nothing was kept is taken away again, and so is a folder made for it.

    Raises:
        UserError: another run is writing into the folder; the file is of another version, none of
            ours or broken; the folder cannot be written.
    """
    path = folder / FILE
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); mend its rights or name another output"
        ) from error
    connection = connect(path)
    try:
        yield connection
    finally:
        empty = not count_replies(connection, path)
        connection.close()
        if empty:
            path.unlink(missing_ok=True)
        if empty and made and not any(folder.iterdir()):
            folder.rmdir()


def count_replies(connection: sqlite3.Connection, path: Path) -> int:
    """Replies kept in an open file."""
    try:
        (count,) = connection.execute("SELECT COUNT(*) FROM replies").fetchone()
    except sqlite3.Error as error:
        raise told(path, error) from error
    return int(count)


def connect(path: Path) -> sqlite3.Connection:
    """Open a file and lock it; raises as `locked` does."""
    try:
        # No waiting for a lock: who holds it is a run, which may take hours.
        connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    except sqlite3.Error as error:
        raise told(path, error) from error
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN EXCLUSIVE")
        _check_schema(path, connection)
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        connection.close()
        raise told(path, error) from error
    except UserError:
        connection.close()
        raise
    return connection


def _check_schema(path: Path, connection: sqlite3.Connection) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if not tables and not application:
        for statement in _TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
    elif application != _APPLICATION:
        raise UserError(f"{path}: not a file of cwdpo-bench; name another output folder")
    elif schema != SCHEMA:
        raise UserError(
            f"{path}: replies kept by another version of cwdpo-bench (schema {schema}, this is "
            f"{SCHEMA}); remove the file, or name another output folder"
        )


def told(path: Path, error: sqlite3.Error) -> UserError:
    """What is wrong with the file, and the mend."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UserError(
            f"{path.parent}: another run is writing into this folder; wait for it, or name another "
            "output folder"
        )
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return UserError(f"{path}: broken ({error}); remove the file: its samples are asked again")
    return UserError(f"{path}: cannot be written ({error}); free space or mend the rights")
