"""Writes that are whole or absent (a temporary file beside the target, fsync, rename), and locks.

JSON is strict: a NaN or an infinity is refused, because other readers refuse it later.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cwdpo_bench.errors import UserError


@contextmanager
def _user_error_on_os_error(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path}: cannot be {verb} ({reason}); free space or mend the rights, then run again"
        ) from error


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    Raises:
        UserError: the folder cannot be made or the file cannot be written (disk full, no right).
    """
    with _user_error_on_os_error(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # mkstemp makes files private; results are as readable as any other file of the user.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def existing_parent(path: Path) -> Path:
    """`path` itself where it is there, else the nearest folder above it that is."""
    there = path
    while not there.exists():
        there = there.parent
    return there


def remove_unfinished(*folders: Path) -> None:
    """Take away the temporary files that writers which were killed have left in `folders`."""
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict, indented JSON, atomically.

    Raises:
        UserError: a number is NaN or infinite, or the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path}: not written, a value is NaN or infinite ({error})") from error
    write_text(path, text + "\n")


_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
"""What a system says of a file that another process has locked."""


def is_locked(path: Path) -> bool:
    """Whether another process holds the file's lock, here or on another node; not if it is missing
    or its file system has no locks."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN
    return False


def lock(file: IO[Any], path: Path, taken: str) -> None:
    """Lock an open file without waiting; the lock goes with the process, however that ends.

    Raises:
        UserError: another process holds it, told as `taken`, or the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise UserError(taken) from error
        raise UserError(
            f"{path}: cannot be locked ({error.strerror}), so that two processes could write there "
            "at a time; name a folder on another file system"
        ) from error


def sha256_of(paths: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def read_json(path: Path) -> Any:
    """Read strict JSON.

    Raises:
        UserError: the file is missing, unreadable, or not strict JSON (the line is named).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; write null or leave the field out") from error
