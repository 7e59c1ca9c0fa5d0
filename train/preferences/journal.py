"""What a language model has written for a preference file, kept line by line as it comes.

One JSON line a caption, synced before the next is asked: whatever ends the process, what was paid
for is there. A line that was cut off is taken away at the next start. The file says what each
caption cost and why replies to it were refused, and may be deleted once the output is as wanted.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cwdpo_bench.errors import UserError
from cwdpo_bench.files import lock


def journal_of(output: Path) -> Path:
    """Where the replies for an output file are kept: beside it."""
    return output.with_suffix(".replies.jsonl")


def key_of(asked: Mapping[str, Any]) -> str:
    """Names all that a caption's outcome follows from."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


class Journal:
    """The outcomes kept in one file; made by `open_journal`. Safe to use from several threads."""

    def __init__(self, file: IO[bytes], kept: dict[str, dict[str, Any]]) -> None:
        """Take an open, locked file and what it holds."""
        self._file, self._kept, self._lock = file, kept, threading.Lock()

    def find(self, key: str) -> dict[str, Any] | None:
        """The outcome of a key, or None."""
        return self._kept.get(key)

    def keep(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Keep an outcome; it is on disk when this returns.

        Raises:
            UserError: the disk is full or refuses.
        """
        line = json.dumps({"key": key, **outcome}, ensure_ascii=False) + "\n"
        with self._lock, _told(Path(self._file.name)):
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._kept[key] = dict(outcome)


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """The journal in a file, locked until the block ends; made where it is missing.

    Raises:
        UserError: another process is writing it, it is no such file, or it cannot be written.
    """
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        lock(
            file, path, f"{path}: another run is writing it; wait for it, or name another --output"
        )
        with _told(path):
            kept = _whole_lines(file, path)
        yield Journal(file, kept)


def _whole_lines(file: IO[bytes], path: Path) -> dict[str, dict[str, Any]]:
    """What is kept there; a last line that was cut off is taken away."""
    kept: dict[str, dict[str, Any]] = {}
    end = 0
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            outcome = json.loads(line)
            kept[outcome.pop("key")] = outcome
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: line {number}: not a kept reply; mend the line, or remove the file to "
                "ask for everything again"
            ) from error
        end += len(line)
    file.truncate(end)
    return kept


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free space or mend the rights"
        ) from error
