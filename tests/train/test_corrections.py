"""OPA-DPO's own answers and their corrections."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.corrections import corrected_answer, usable_pairs, with_own_answers
from cwdpo_bench.train.data import Pair, normalized
from cwdpo_bench.vlm import Sample

WORDS = st.lists(st.sampled_from(["a", "red", "blue", "circle", "left", "of"]), max_size=8)


def _pair(number: int, chosen: str = "A red circle.", **fields: object) -> Pair:
    pair = Pair(f"p{number}", "line", (), "?", chosen, None, (chosen,))
    return dataclasses.replace(pair, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "reference", "expected"),
    [
        # A word that contradicts is replaced, all else is left as the policy wrote it.
        ("A blue circle.", "A red circle.", "A red circle."),
        ("a blue circle on grey", "A red circle.", "a red circle"),
        # "There is" stands for nothing in the reference.
        ("There is a blue circle", "A red circle left of a square", "a red circle"),
        # What the own answer adds is left out, what it leaves out is no fault.
        ("A small red circle.", "A red circle.", "A red circle."),
        ("A blue circle.", "A red circle above a square.", "A red circle."),
        # It only leaves out: the reference is the correction.
        ("A circle.", "A red circle.", "A red circle."),
        ("nothing alike", "A red circle.", "A red circle."),
    ],
)
def test_a_correction_replaces_contradictions_and_drops_additions(
    own: str, reference: str, expected: str
) -> None:
    assert corrected_answer(own, reference) == expected


@given(own=WORDS, reference=WORDS)
def test_a_correction_says_nothing_that_the_reference_does_not(
    own: list[str], reference: list[str]
) -> None:
    corrected = corrected_answer(" ".join(own), " ".join(reference)).split()
    # Its words are the reference's, in their order.
    rest = iter(reference)
    assert all(word in rest for word in corrected)
    assert corrected_answer(" ".join(reference), " ".join(reference)).split() == reference
    if own != reference and reference:
        assert normalized(" ".join(corrected)) != normalized(" ".join(own))


def test_own_answers_are_drawn_once_and_kept_for_a_resumed_run(tmp_path: Path) -> None:
    pairs = [_pair(i) for i in range(5)]
    pairs[1] = _pair(1, rejected="A blue circle.", corrected="A reddish circle.")
    answers = [
        Sample("A blue circle.", [], True),
        Sample(" ", [], True),
        Sample("a red circle", [], True),
        Sample("A blue circle on", [], False),
    ]
    asked: list[Sequence[Pair]] = []

    def draw(rows: Sequence[Pair]) -> list[Sample]:
        asked.append(rows)
        return answers

    done, unusable = with_own_answers(pairs, tmp_path, draw)
    # The row that brings a correction keeps its own answer and is not sampled for.
    assert asked == [[pairs[0], *pairs[2:]]]
    assert done[1] == pairs[1]
    assert (done[0].rejected, done[0].corrected) == ("A blue circle.", "A red circle.")
    assert unusable == {"empty": 1, "equal to chosen": 1, "cut off": 1}
    for pair in done[2:]:
        assert (pair.rejected, pair.corrected) == (None, "A red circle.")
    assert with_own_answers(pairs, tmp_path, draw) == (done, unusable)
    assert len(asked) == 1
    assert usable_pairs("stage2", done, unusable) == done[:2]


def test_no_usable_own_answer_is_said_with_its_mend() -> None:
    with pytest.raises(UserError, match=r"stage2\.own: none .*'cut off': 1.*max_new_tokens"):
        usable_pairs("stage2", [_pair(0)], {"cut off": 1})
