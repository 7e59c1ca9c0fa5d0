"""Replies kept on disk as they arrive, so that a run that ends early goes on where it stopped.

One SQLite file in the run folder (`evaluate/run_file.py`): whatever ends the process, what was kept
is there and nothing is half there, and one run writes at a time. A reply is found by a key that
names all that it follows from (`evaluate/asking.py`), and its arrays come back with the same bits.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer
from cwdpo_bench.evaluate.run_file import FILE, connect, count_replies, locked, told
from cwdpo_bench.vlm import TokenScores

_TYPES = {kind.__name__: kind for kind in (CaptionAnswer, ChoiceAnswer, TokenScores)}
Reply = CaptionAnswer | ChoiceAnswer


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
        return count_replies(self._connection, self.path)

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
            raise told(self.path, error) from error


@contextmanager
def open_store(folder: Path) -> Iterator[ReplyStore]:
    """The store of a run folder, made where it is missing; locks and raises as `locked` does."""
    with locked(folder) as connection:
        yield ReplyStore(folder / FILE, connection)


def kept_timings(folder: Path) -> dict[str, Timing]:
    """What a folder's store says of the time that its replies took; nothing where there is none.

    Writes nothing. Raises as `open_store` does.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    connection = connect(path)
    try:
        return ReplyStore(path, connection).timings()
    finally:
        connection.close()


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
