"""Replies kept on disk as they arrive, so that a run that ends early goes on where it stopped.

One SQLite file in the run folder, written ahead (WAL) and synced at every commit: whatever ends the
process, what was kept is there and nothing is half there. One run writes at a time; its lock is the
operating system's and dies with it. A reply is found by a key that names all that it follows from
(`evaluate/asking.py`), and its arrays come back with the same bits.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer
from cwdpo_bench.vlm import TokenScores

FILE = "replies.sqlite"
_APPLICATION = 0x43574450
"""Stands in the file's header and tells it from any other SQLite file."""
_TYPES = {kind.__name__: kind for kind in (CaptionAnswer, ChoiceAnswer, TokenScores)}
SCHEMA = 1
"""Of the tables; raised when they change."""

Reply = CaptionAnswer | ChoiceAnswer

_TABLES = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE replies (key BLOB PRIMARY KEY, task TEXT NOT NULL, sample TEXT NOT NULL, "
    "reply BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE timings (task TEXT NOT NULL, samples INTEGER NOT NULL, seconds REAL NOT NULL)",
)


class Keep(NamedTuple):
    """A reply to be kept.

    Attributes:
        key: what it is found by.
        sample: the sample's id, for whoever looks into the file.
        reply: text, numbers and arrays.
    """

    key: bytes
    sample: str
    reply: Reply


class Timing(NamedTuple):
    """Over all starts of a run: how many samples were answered, and in how many seconds."""

    samples: int
    seconds: float


class ReplyStore:
    """The replies of one run folder; made by `open_store`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Take an open, locked file."""
        self.path = path
        self._connection = connection

    def fact(self, name: str) -> Any:
        """What was noted under a name, or None."""
        row = self._run("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def note(self, name: str, value: object) -> None:
        """Note something of the run itself, as JSON."""
        text = json.dumps(value, sort_keys=True, allow_nan=False)
        self._run("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, text))

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Reply]:
        """Those of the keys that have a reply, with it."""
        found = {}
        for key in keys:
            row = self._run("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = reply_from_bytes(row[0])
        return found

    def keep(self, task: str, replies: Sequence[Keep], seconds: float) -> None:
        """Keep replies of a task, all or none of them, and the time that they took.

        Raises:
            UserError: the disk is full or refuses.
        """
        rows = [(keep.key, task, keep.sample, reply_to_bytes(keep.reply)) for keep in replies]
        with self._transaction():
            for row in rows:
                self._run("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)
            self._run("INSERT INTO timings VALUES (?, ?, ?)", (task, len(rows), seconds))

    def drop_all(self) -> int:
        """Forget every reply and timing; returns how many replies there were."""
        with self._transaction():
            self._run("DELETE FROM timings")
            return self._run("DELETE FROM replies").rowcount

    def __len__(self) -> int:
        """Replies kept."""
        (count,) = self._run("SELECT COUNT(*) FROM replies").fetchone()
        return int(count)

    def timings(self) -> dict[str, Timing]:
        """By task."""
        rows = self._run("SELECT task, SUM(samples), SUM(seconds) FROM timings GROUP BY task")
        return {task: Timing(samples, seconds) for task, samples, seconds in rows}

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._run("BEGIN IMMEDIATE")
        try:
            yield
            self._run("COMMIT")
        except BaseException:
            # A full disk may have rolled back already.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _run(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.IntegrityError:
            # No trouble of the disk: a fault of ours.
            raise
        except sqlite3.Error as error:
            raise _told(self.path, error) from error


@contextmanager
def open_store(folder: Path) -> Iterator[ReplyStore]:
    """The store of a run folder, locked until the block ends; made where it is missing.

    A store in which nothing was kept is taken away again, and so is a folder made for it.

    Raises:
        UserError: another run is writing into the folder; the file is of another version, no store
            or broken; the folder cannot be written.
    """
    path = folder / FILE
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); mend its rights or name another output"
        ) from error
    connection = _connect(path)
    store = ReplyStore(path, connection)
    try:
        yield store
    finally:
        empty = not len(store)
        connection.close()
        if empty:
            path.unlink(missing_ok=True)
        if empty and made and not any(folder.iterdir()):
            folder.rmdir()


def kept_timings(folder: Path) -> dict[str, Timing]:
    """What a folder's store says of the time that its replies took; nothing where there is none.

    Writes nothing. Raises as `open_store` does.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    connection = _connect(path)
    try:
        return ReplyStore(path, connection).timings()
    finally:
        connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    try:
        # No waiting for a lock: who holds it is a run, which may take hours.
        connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    except sqlite3.Error as error:
        raise _told(path, error) from error
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN EXCLUSIVE")
        _check_schema(path, connection)
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        connection.close()
        raise _told(path, error) from error
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


def _told(path: Path, error: sqlite3.Error) -> UserError:
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


# --- replies as bytes ----------------------------------------------------------------------------


def reply_to_bytes(reply: Reply) -> bytes:
    """A reply as a JSON head, with the arrays' types and shapes, and the arrays' own bytes."""
    arrays: list[bytes] = []

    def plain(value: object) -> object:
        if isinstance(value, np.ndarray):
            arrays.append(value.tobytes())
            return {"array": value.dtype.str, "shape": value.shape}
        if isinstance(value, tuple) and type(value).__name__ in _TYPES:
            fields = {name: plain(getattr(value, name)) for name in value._fields}  # type: ignore[attr-defined]
            return {"is": type(value).__name__, "fields": fields}
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        return value

    head = json.dumps(plain(reply)).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *arrays])


def reply_from_bytes(data: bytes) -> Reply:
    """The reply that `reply_to_bytes` wrote, equal to the bit."""
    start = 4 + int.from_bytes(data[:4], "little")

    def whole(value: Any) -> Any:
        nonlocal start
        if isinstance(value, list):
            return tuple(whole(part) for part in value)
        if not isinstance(value, dict):
            return value
        if "is" in value:
            fields = {name: whole(part) for name, part in value["fields"].items()}
            return _TYPES[value["is"]](**fields)
        dtype, shape = np.dtype(value["array"]), tuple(value["shape"])
        count = int(np.prod(shape))
        array = np.frombuffer(data, dtype, count, start).reshape(shape).copy()
        start += array.nbytes
        return array

    reply: Reply = whole(json.loads(data[4:start]))
    return reply
