"""METEOR's program: one start a block, an end to each, and no answer taken for another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cwdpo_bench.evaluate.meteor import begin_segments, kept_meteor, segment_statistics

ECHO_LENGTH = 'while IFS= read -r line; do echo "${#line} $$"; done'
"""In METEOR's place: answers with the length of the line and its own process id."""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))

    def become(script: str) -> None:
        java.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exit 0\n{script}\n')
        java.chmod(0o755)

    become(ECHO_LENGTH)
    return become


def ask(*candidates: str) -> np.ndarray:
    names = [str(n) for n in range(len(candidates))]
    return segment_statistics(
        {name: ["ref"] for name in names},
        {name: [text] for name, text in zip(names, candidates, strict=True)},
    )


def is_running(process: float) -> bool:
    stat = Path(f"/proc/{int(process)}/stat")
    return stat.exists() and stat.read_text().split(") ")[1][0] != "Z"


def test_answers_come_in_order_and_the_program_ends(program: Callable[[str], None]) -> None:
    answers = ask("", "a", "aaa", "a|||a")
    assert (answers[:, 0] - answers[0, 0]).tolist() == [0, 1, 3, 2]
    assert len(set(answers[:, 1])) == 1
    assert not is_running(answers[0, 1])


def test_a_block_starts_it_once(program: Callable[[str], None]) -> None:
    with kept_meteor():
        first = ask("a")[0, 1]
        with kept_meteor():
            assert ask("b")[0, 1] == first
        assert ask("c")[0, 1] == first
        assert is_running(first)
    assert not is_running(first)
    assert ask("d")[0, 1] != first


def test_a_block_without_captions_starts_nothing(
    program: Callable[[str], None], tmp_path: Path
) -> None:
    program(f"touch {tmp_path}/started; {ECHO_LENGTH}")
    with kept_meteor():
        pass
    assert not (tmp_path / "started").exists()
    ask("a")
    assert (tmp_path / "started").exists()


def test_it_ends_with_the_block_on_an_error_too(program: Callable[[str], None]) -> None:
    processes = []

    def fail() -> None:
        with kept_meteor():
            processes.append(ask("a")[0, 1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not is_running(processes[0])


@pytest.mark.parametrize(
    "script",
    ["exit 1", "echo out of memory >&2; exit 1", "cat", "read -r line; echo; cat", "kill -9 $$"],
)
def test_a_program_that_fails_is_told_and_not_used_again(
    program: Callable[[str], None], script: str
) -> None:
    with kept_meteor():
        program(script)
        with pytest.raises(RuntimeError, match="METEOR answered") as caught:
            ask("a", "b")
        assert ("out of memory" in str(caught.value)) == ("memory" in script)
        program(ECHO_LENGTH)
        assert ask("a").shape == (1, 2)


def test_threads_do_not_get_each_others_answers(program: Callable[[str], None]) -> None:
    answers = {}

    def work(size: int) -> None:
        answers[size] = ask(*["a" * size] * 50)[:, 0]

    threads = [threading.Thread(target=work, args=(size,)) for size in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in range(8):
        assert set(answers[size] - answers[0][0]) == {size}


def test_captions_are_answered_while_the_caller_goes_on(
    program: Callable[[str], None], tmp_path: Path
) -> None:
    program(f"while [ ! -e {tmp_path}/go ]; do sleep 0.01; done; {ECHO_LENGTH}")
    with kept_meteor(start=True):
        first = begin_segments({"1": ["ref"]}, {"1": ["a"]})
        second = begin_segments({"1": ["ref"], "2": ["ref"]}, {"1": ["aa"], "2": ["aaa"]})
        (tmp_path / "go").touch()
        assert (second()[:, 0] - first()[0, 0]).tolist() == [1, 2]


def test_more_captions_than_the_pipes_hold_do_not_block(program: Callable[[str], None]) -> None:
    answers = ask(*["word " * 100] * 5000)
    assert len(answers) == 5000


def test_start_begins_before_the_first_caption(
    program: Callable[[str], None], tmp_path: Path
) -> None:
    program(f"touch {tmp_path}/started; {ECHO_LENGTH}")
    with kept_meteor(start=True):
        for _ in range(500):
            if (tmp_path / "started").exists():
                break
            time.sleep(0.01)
        assert (tmp_path / "started").exists()


def test_a_block_that_fails_does_not_wait_for_its_captions(program: Callable[[str], None]) -> None:
    program("exec sleep 100")
    begun = []

    def fail() -> None:
        with kept_meteor(start=True):
            begun.extend(begin_segments({"1": ["ref"]}, {"1": ["a"]}) for _ in range(2))
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fail()
    for answers in begun:
        with pytest.raises(RuntimeError, match="METEOR"):
            answers()
    assert time.monotonic() - started < 30


def test_outside_a_block_nothing_is_started(program: Callable[[str], None]) -> None:
    with pytest.raises(RuntimeError, match="kept_meteor"):
        begin_segments({"1": ["ref"]}, {"1": ["a"]})()
