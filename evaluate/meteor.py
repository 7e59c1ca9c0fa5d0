"""METEOR's own statistics of captions, from the jar that pycocoevalcap carries.

The program loads its paraphrase table when it starts, which costs more of a core than scoring
thousands of captions. So within `with kept_meteor():` it is started once, and `begin_segments`
sends captions and comes back at once: the caller does its own part while METEOR works.

Source: Denkowski and Lavie, Meteor Universal (WMT 2014); the protocol is METEOR 1.5's `-stdio`: a
line `SCORE ||| reference ||| … ||| candidate` is answered by a line of 23 numbers.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
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
    with kept_meteor():
        return begin_segments(references, predictions)()


def begin_segments(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, Sequence[str]]
) -> Callable[[], Floats]:
    """Send the captions to METEOR; what comes back waits for `segment_statistics` of them.

    To be called, and waited for, within a block of `kept_meteor`. Captions of several calls are
    answered one call after the other.
    """
    lines = [
        f" {_BAR} ".join(["SCORE", *(text.replace(_BAR, "") for text in [*texts, candidate])])
        for texts, (candidate,) in zip(references.values(), predictions.values(), strict=True)
    ]
    answers = _shared.begin(lines)
    return lambda: np.array(answers.result()).reshape(len(lines), -1)


@contextmanager
def kept_meteor(*, start: bool = False) -> Iterator[None]:
    """Keep one METEOR running for everything that is scored within the block.

    Blocks may be nested and may overlap in several threads: the last one to end, ends it.

    Args:
        start: start it now, so that it loads its table while the caller prepares the captions;
            otherwise the first caption does.
    """
    _shared.enter()
    try:
        if start:
            _shared.start()
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

    def answers(self, lines: Sequence[str]) -> list[list[float]]:
        # All lines are written by a thread of its own: to wait for each answer before the next line
        # would make both processes sleep and wake up once a caption.
        feeder = threading.Thread(target=self._feed, args=(lines,), daemon=True)
        feeder.start()
        answers = [self._answer(line) for line in lines]
        feeder.join()
        return answers

    def _feed(self, lines: Sequence[str]) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        # A program that has ended is told by what it does not answer.
        with suppress(BrokenPipeError, ValueError):
            for line in lines:
                stdin.write(f"{line}\n".encode("utf-8", "replace"))
            stdin.flush()

    def _answer(self, line: str) -> list[float]:
        stdout = self._process.stdout
        assert stdout is not None
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

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()


class _Shared:
    """The METEOR of all open blocks."""

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._turn = threading.Lock()
        """Held while the program answers, so that nobody reads another's answers."""
        self._blocks = 0
        self._program: _Program | None = None

    def enter(self) -> None:
        with self._state:
            self._blocks += 1

    def leave(self) -> None:
        with self._state:
            self._blocks -= 1
            if self._blocks:
                return
            program, self._program = self._program, None
        if program is not None:
            # Whoever still waits for its answers gets an error and gives the turn back.
            program.kill()
            with self._turn:
                program.close()

    def start(self) -> _Program:
        with self._state:
            if self._blocks == 0:
                raise RuntimeError("METEOR is asked outside a block of kept_meteor()")
            if self._program is None:
                self._program = _Program()
            return self._program

    def begin(self, lines: Sequence[str]) -> Future[list[list[float]]]:
        future: Future[list[list[float]]] = Future()

        def work() -> None:
            try:
                future.set_result(self._answers(lines))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def _answers(self, lines: Sequence[str]) -> list[list[float]]:
        with self._turn:
            if not lines:
                return []
            program = self.start()
            try:
                return program.answers(lines)
            except BaseException:
                # Whatever it still has to say would be taken for the answer to the next line.
                with self._state:
                    is_ours = self._program is program
                    if is_ours:
                        self._program = None
                if is_ours:
                    program.close()
                raise


_shared = _Shared()
