"""The store of replies: the same bits back, one writer, nothing lost with the process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.engine import CaptionAnswer, ChoiceAnswer
from cwdpo_bench.evaluate.run_file import FILE
from cwdpo_bench.evaluate.store import (
    Keep,
    Timing,
    kept_timings,
    open_store,
    reply_from_bytes,
    reply_to_bytes,
)
from cwdpo_bench.vlm import TokenScores

TEXTS = st.text(st.characters(codec=None), max_size=20)
"""Lone surrogates among them: a decoder may give anything."""
FLOATS = arrays.arrays(np.float32, st.integers(0, 5))
REPLIES = st.one_of(
    st.builds(
        ChoiceAnswer,
        TEXTS,
        st.none() | arrays.arrays(st.sampled_from([np.float32, np.float64]), st.integers(0, 5)),
    ),
    st.builds(
        CaptionAnswer,
        TEXTS,
        st.none()
        | st.builds(
            TokenScores,
            FLOATS,
            FLOATS,
            FLOATS,
            arrays.arrays(np.bool_, st.integers(0, 5)),
            st.none() | FLOATS,
            st.none() | FLOATS,
        ),
        st.lists(TEXTS, max_size=3).map(tuple),
    ),
)


def same(one: object, other: object) -> bool:
    """Equal in every type and bit, NaN's payload and the sign of 0 included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray)
        kinds = (one.dtype, one.shape) == (other.dtype, other.shape)
        return kinds and one.tobytes() == other.tobytes()
    if isinstance(one, tuple):
        assert isinstance(other, tuple)
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def _keep(name: str, text: str = "a reply") -> Keep:
    return Keep(name.encode(), name, ChoiceAnswer(text, np.log(np.array([0.1, 0.9]))))


@given(REPLIES)
def test_a_reply_comes_back_with_the_same_bits(reply: CaptionAnswer | ChoiceAnswer) -> None:
    assert same(reply_from_bytes(reply_to_bytes(reply)), reply)


def test_what_is_kept_is_found_by_its_key_alone_and_after_reopening(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.keep("mmmu", [_keep("a"), _keep("b", "other")], 1.5)
        store.keep("mmmu", [_keep("c")], 0.5)
        store.keep("coco", [_keep("d")], 4.0)
        store.note("run", {"b": [1, None], "a": "ü"})
    with open_store(tmp_path) as store:
        found = store.find([b"a", b"b", b"x"])
        assert set(found) == {b"a", b"b"}
        assert same(found[b"b"], _keep("b", "other").reply)
        assert store.fact("run") == {"b": [1, None], "a": "ü"}
        assert store.fact("none") is None
        assert len(store) == 4
        assert store.timings() == {"mmmu": Timing(3, 2.0), "coco": Timing(1, 4.0)}
    assert kept_timings(tmp_path)["mmmu"] == Timing(3, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_all_replies_of_a_call_are_kept_or_none(tmp_path: Path) -> None:
    bad = Keep(b"c", "c", ChoiceAnswer("fine", None))
    with open_store(tmp_path) as store:
        store.keep("mmmu", [_keep("a")], 1)
        with pytest.raises(sqlite3.IntegrityError):
            store.keep("mmmu", [_keep("b"), bad._replace(sample=None)], 1)  # type: ignore[arg-type]
        assert set(store.find([b"a", b"b", b"c"])) == {b"a"}
        assert store.timings() == {"mmmu": Timing(1, 1.0)}
        store.keep("mmmu", [bad], 1)


def test_replies_can_be_forgotten(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.keep("mmmu", [_keep("a"), _keep("b")], 1)
        assert store.drop_all() == 2
        assert (len(store), store.timings()) == (0, {})


def test_an_empty_store_leaves_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new" / "run").exists()
    with open_store(tmp_path):
        pass
    assert not (tmp_path / FILE).exists()
    assert kept_timings(tmp_path) == {}


def test_a_second_writer_is_refused_at_once_and_the_first_goes_on(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.keep("mmmu", [_keep("a")], 1)
        for attempt in (lambda: open_store(tmp_path).__enter__(), lambda: kept_timings(tmp_path)):
            with pytest.raises(UserError, match="another run is writing into this folder"):
                attempt()
        store.keep("mmmu", [_keep("b")], 1)
        assert len(store) == 2


def _keep_and_die(folder: Path) -> None:
    with open_store(folder) as store:
        store.keep("mmmu", [_keep("a")], 1)
        store._run("BEGIN IMMEDIATE")
        store._run("INSERT INTO replies VALUES (x'00', 'mmmu', 'half', x'00')")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_what_it_kept_and_no_lock(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_keep_and_die, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    with open_store(tmp_path) as store:
        assert len(store) == 1
        assert same(store.find([b"a"])[b"a"], _keep("a").reply)


def test_another_versions_store_is_refused_with_the_mend(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.keep("mmmu", [_keep("a")], 1)
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(UserError, match=r"another version.*schema 99.*remove the file"):
        open_store(tmp_path).__enter__()


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(UserError, match="not a file of cwdpo-bench"):
        open_store(tmp_path).__enter__()
    (tmp_path / FILE).write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=r"broken.*remove the file"):
        open_store(tmp_path).__enter__()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        open_store(tmp_path / "file" / "run").__enter__()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.keep("mmmu", [_keep("a")], 1)
        (pages,) = store._run("PRAGMA page_count").fetchone()
        store._run(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(UserError, match=r"replies\.sqlite: cannot be written.*free space"):
            store.keep("mmmu", [_keep("b", "long" * 100_000)], 1)
        assert set(store.find([b"a", b"b"])) == {b"a"}
