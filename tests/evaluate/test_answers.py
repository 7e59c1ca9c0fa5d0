"""Replies and what they say. The MMMU cases are what its repository's own functions give."""

from __future__ import annotations

from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwdpo_bench.evaluate.answers import (
    DISCIPLINES,
    accepted_answers,
    is_open_answer,
    normalize_answer,
    parse_mmbench_choice,
    parse_mmmu_choice,
    parse_mmmu_open,
)

OPTIONS = {"A": "a cat", "B": "dark red", "C": "red", "D": "None"}

FRAGMENTS = """(A)|(B)|A|B| C |.|,|\n|answer is|so |=|3.14|1,234|-5|1e-5|a cat|red|dark red|1/64
|$1|nan|inf|'|:||日本|É"""
pieces = st.sampled_from(FRAGMENTS.split("|"))
replies = st.lists(pieces, max_size=9).map(" ".join) | st.text(max_size=40)


def test_there_are_six_disciplines_and_thirty_subjects() -> None:
    subjects = [subject for names in DISCIPLINES.values() for subject in names]
    assert len(DISCIPLINES) == 6
    assert len(subjects) == len(set(subjects)) == 30


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("'B'.", "B"),
        (".B,", "B"),
        ("B,.", None),  # The marks go in a fixed order: the comma had its turn before the point.
        ("(B)", "B"),
        ("(B) dark red", "B"),
        ("B) dark red", None),
        ("The answer is B", "B"),
        ("A or B", "B"),  # The last one counts.
        ("(A), then B", "A"),  # In brackets comes first.
        ("(B) (A) (B)", "B"),
        ("b", None),
        ("", None),
        ("A\n", None),  # Only a space ends a letter.
        ("dark red", None),  # The text counts in replies of more than five words.
        ("I am sure that it is dark red", "C"),  # "red" is found later in it than "dark red".
        ("I think this picture shows A CAT here", "A"),
        ("A cat sits there", "A"),  # An article passes for the letter in the official code too.
    ],
)
def test_mmmu_letters(reply: str, letter: str | None) -> None:
    assert parse_mmmu_choice(reply, OPTIONS) == letter


def test_mmmu_text_found_last_counts() -> None:
    reply = "it is dark red and not at all plain red"
    assert parse_mmmu_choice(reply, OPTIONS) == "C"
    assert parse_mmmu_choice("it may be a cat or else dark red", {**OPTIONS, "C": "-"}) == "B"


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        ("24.31", [24.31]),
        ("1,234.567", [1234.0, 1234.57, 234.57]),
        ("the result is 7,000", [0.0, 7000.0]),  # The plain pattern finds "000" in it.
        ("Hormone", ["hormone"]),
        ("4", [4.0]),
        ("b", [" b", "b "]),
        ("x = 5", [5.0]),
        ("So the answer is 3.\nTherefore it is 4.", [3.0, 4.0]),
        ("$1.00", ["$1.00", 1.0]),
        ("1e3 watts", ["1e3 watts", 1000.0, 3.0]),
        ("", None),
        (" \n ", None),
        ("...", None),
    ],
)
def test_mmmu_open_answers(reply: str, answers: list[object] | None) -> None:
    assert parse_mmmu_open(reply) == answers


@pytest.mark.parametrize(
    ("reply", "gold", "right"),
    [
        ("24.312", "24.31", True),
        ("24.32", "24.31", False),
        ("1,000", "1000", True),
        ("36 watts", "36", True),
        ("3.43 ft/s", "['24/7', '3.429']", True),
        ("24/7", "['24/7', '3.429']", True),
        ("It is Tampa, I believe", "['Tampa', 'Florida']", True),
        ("Transformation", "transformation", True),
        ("Formation", "Transformation", False),
        ("Step b", "B", True),
        ("Embryo", "B", False),  # One letter is not found inside a word.
        ("0", "0.5", False),
    ],
)
def test_mmmu_open_judgement(reply: str, gold: str, right: bool) -> None:
    answers = parse_mmmu_open(reply)
    assert answers is not None
    assert is_open_answer(answers, gold) is right


def test_a_list_of_accepted_answers_is_read_only_where_it_is_one() -> None:
    assert accepted_answers("['$MgS$', 'MgS']") == ["$MgS$", "MgS"]
    for text in ("[0, 1]", "[", "[]", "MgS", "[a, b)"):
        assert accepted_answers(text) == [text]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        ("a.", "A"),
        ("(B)", "B"),
        (" B\n", "B"),
        ("**C**", "C"),
        ("Answer: C", "C"),
        ("answer: (D)", "D"),
        ("The answer is D.", "D"),
        ("The correct answer is B because it is dark", "B"),
        ("option A is right", "A"),
        ("B. dark red", "B"),
        ("B dark red", "B"),
        ("dark red", "B"),
        ("Dark red.", "B"),
        ("It is dark red.", "B"),  # "red" stands there only as a part of "dark red".
        ("It is red.", "C"),
        ("D) None", "D"),
        ("The answer is a cat", "A"),
        ("A cat", "A"),
        ("", None),
        ("E", None),
        ("A man walks", None),
        ("The answer is a dog", None),
        ("(A) or (B)", None),
        ("red or a cat", None),
        ("I do not know", None),
        ("covered", None),  # "red" within a word.
    ],
)
def test_mmbench_letters(reply: str, letter: str | None) -> None:
    assert parse_mmbench_choice(reply, OPTIONS) == letter


@pytest.mark.parametrize("count", [2, 3, 4])
def test_mmbench_takes_every_plain_form_of_every_letter(count: int) -> None:
    options = dict(zip(ascii_uppercase[:count], ["two.", "(three)", "a b", "*"], strict=False))
    for letter, text in options.items():
        for form in ("{0}", "{0}.", "({0})", "Answer: {0}", "The answer is ({0}).", "{0}. {1}"):
            assert parse_mmbench_choice(form.format(letter, text), options) == letter, form


@given(reply=replies)
def test_any_reply_gives_an_option_or_none(reply: str) -> None:
    assert parse_mmmu_choice(reply, OPTIONS) in {*OPTIONS, None}
    assert parse_mmbench_choice(reply, OPTIONS) in {*OPTIONS, None}


@given(reply=replies)
def test_open_answers_are_numbers_of_two_decimals_or_lower_case(reply: str) -> None:
    for answer in parse_mmmu_open(reply) or []:
        if isinstance(answer, float):
            assert answer != answer or round(answer, 2) == answer
        else:
            assert answer == answer.lower()


@given(number=st.floats(-1e6, 1e6).map(lambda x: round(x, 2)), words=st.sampled_from(["", "is "]))
def test_a_right_number_is_found_in_any_form(number: float, words: str) -> None:
    for text in (f"{number}", f"{number:.2f}", f"{number:,.2f}"):
        answers = parse_mmmu_open(f"{words}{text}")
        assert answers is not None
        assert is_open_answer(answers, str(number)), text


@given(text=st.text(max_size=20))
def test_normalizing_never_fails(text: str) -> None:
    assert normalize_answer(text)
