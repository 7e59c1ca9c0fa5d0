"""Writes are whole or absent, JSON is strict, and faults of the disk are one clear error."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.files import lock, read_json, write_json, write_text, write_with


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    value = {"name": "β ≥ 0", "list": [1, 2.5, None, True]}
    write_json(tmp_path / "deep" / "a.json", value)
    assert read_json(tmp_path / "deep" / "a.json") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_refused_and_leave_the_old_file(
    value: float, tmp_path: Path
) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(UserError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {"x": value})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError):
        write_with(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_files_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on a file's size stands for the full disk: the write fails half-way."""
    write_text(tmp_path / "a.txt", "old")
    code = f"""
import resource, signal
from pathlib import Path
from cwdpo_bench.errors import UserError
from cwdpo_bench.files import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path({str(tmp_path / "a.txt")!r}), "x" * 5000)
except UserError as error:
    print("error:", error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a.txt: cannot be written" in out.stdout
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 1,\n  "b": }', "line 2"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "Infinity"),
        ("", "line 1"),
    ],
)
def test_json_that_is_not_strict_names_file_and_line(
    content: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read_json(tmp_path / "a.json")
    assert "a.json" in str(error.value)


def test_missing_and_undecodable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bin.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bin\.json: cannot be read"):
        read_json(tmp_path / "bin.json")


def test_the_nearest_word_is_named_or_all_of_them() -> None:
    assert nearest("beat", ["beta", "tau"]) == "did you mean 'beta'?"
    assert nearest("zzz", ["beta", "tau"]) == "known: beta, tau"


def test_a_file_is_locked_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with path.open("w") as first, path.open("w") as second:
        lock(first, path, "somebody else writes")
        with pytest.raises(UserError, match=r"^somebody else writes$"):
            lock(second, path, "somebody else writes")
    with path.open("w") as third:
        lock(third, path, "somebody else writes")


def test_a_file_system_without_locks_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "a.lock"
    with path.open("w") as file, pytest.raises(UserError, match=r"No locks available.*another"):
        lock(file, path, "somebody else writes")
