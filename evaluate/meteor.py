"""METEOR's own statistics of captions, from the jar that pycocoevalcap carries.

The program loads its paraphrase table when it starts, which takes about five seconds of one core.
Within `with kept_meteor():` it is started once, by the first caption, and ended with the block.

Source: Denkowski and Lavie, Meteor Universal (WMT 2014); the protocol is METEOR 1.5's `-stdio`: a
line `SCORE ||| reference ||| … ||| candidate` is answered by a line of 23 numbers.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from pycocoevalcap.meteor import meteor

from cwdpo_bench.evaluate.java import JAVA_OPTIONS, find_java
from cwdpo_bench.evaluate.sums import Floats

_COMMAND = ("-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm")
_BAR = "|||"


def segment_statistics(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, Sequence[str]]
) -> Floats:
    """METEOR's statistics [n, 23] of each caption against its best reference.

    Args:
        references: image id → tokenized captions.
        predictions: image id → one tokenized caption, the same ids in the same order.

    Raises:
        RuntimeError: the program ended or said something else.
    """
    lines = [
        f" {_BAR} ".join(["SCORE", *(text.replace(_BAR, "") for text in [*texts, candidate])])
        for texts, (candidate,) in zip(references.values(), predictions.values(), strict=True)
    ]
    with kept_meteor():
        return np.array([_shared.answer(line) for line in lines]).reshape(len(lines), -1)


@contextmanager
def kept_meteor() -> Iterator[None]:
    """Keep one METEOR running for everything that is scored within the block.

    Blocks may be nested and may overlap in several threads: the last one to end, ends it.
    """
    _shared.enter()
    try:
        yield
    finally:
        _shared.leave()


class _Program:
    """A running METEOR."""

    def __init__(self) -> None:
        java = find_java()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives until `close`)
        self._process = subprocess.Popen(
            [java, *JAVA_OPTIONS, *_COMMAND],
            cwd=Path(meteor.__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def answer(self, line: str) -> list[float]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        text = ""
        with suppress(BrokenPipeError):
            stdin.write(f"{line}\n".encode("utf-8", "replace"))
            stdin.flush()
            text = stdout.readline().decode("utf-8", "replace")
        try:
            numbers = [float(word) for word in text.split()]
        except ValueError:
            numbers = []
        if not numbers:
            self._errors.seek(0)
            words = self._errors.read().decode("utf-8", "replace").strip()
            raise RuntimeError(f"METEOR answered {text!r} to {line!r}\n{words[-2000:]}")
        return numbers

    def close(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


class _Shared:
    """The METEOR of all open blocks, started when the first caption comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._program: _Program | None = None

    def enter(self) -> None:
        with self._lock:
            self._blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._end()

    def answer(self, line: str) -> list[float]:
        with self._lock:
            if self._program is None:
                self._program = _Program()
            try:
                return self._program.answer(line)
            except BaseException:
                # Whatever it still has to say would be taken for the answer to the next line.
                self._end()
                raise

    def _end(self) -> None:
        if self._program is not None:
            self._program.close()
            self._program = None


_shared = _Shared()
