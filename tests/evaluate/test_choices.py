"""Answered questions as rows, and the metrics that come of them."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest

from cwdpo_bench.evaluate.choices import OFFICIAL_SEED, choice_rows, failure_warnings
from cwdpo_bench.evaluate.metrics import METRICS, metric_names_for
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, OPEN, ChoiceSample


def question(number: int, gold: str = "B", **changes: object) -> ChoiceSample:
    fields = {
        "id": f"q{number}",
        "cluster": f"q{number}",
        "images": (),
        "prompt": f"Question {number}?",
        "question_type": MULTIPLE_CHOICE,
        "options": ("a cat", "a dog", "a cow"),
        "gold": gold,
        "groups": ("Science", "Math"),
    }
    return ChoiceSample(**{**fields, **changes})


def open_question(number: int, gold: str) -> ChoiceSample:
    return question(number, gold, question_type=OPEN, options=())


def corpus_value(name: str, rows: pd.DataFrame) -> float:
    return float(METRICS[name].value(METRICS[name].statistics(rows).sum(axis=0)))


def test_a_row_says_what_was_asked_answered_and_right() -> None:
    samples = [
        question(0),
        question(1),
        question(2),
        open_question(3, "['24/7', '3.429']"),
        open_question(4, "5"),
    ]
    rows = choice_rows(samples, ["(B)", "A", "no idea", "It is 3.43", ""], rules="mmmu")
    assert rows["id"].tolist() == ["q0", "q1", "q2", "q3", "q4"]
    assert rows["prediction"].tolist() == ["(B)", "A", "no idea", "It is 3.43", ""]
    assert rows["parsed"].tolist() == ["B", "A", None, "[3.43]", None]
    assert rows["correct"].tolist() == [True, False, False, True, False]
    assert rows["gold"].tolist() == ["B", "B", "B", "['24/7', '3.429']", "5"]
    assert rows["options"].tolist() == [["a cat", "a dog", "a cow"]] * 3 + [[], []]
    assert rows["groups"].tolist() == [["Science", "Math"]] * 5
    assert rows["question_type"].tolist() == [MULTIPLE_CHOICE] * 3 + [OPEN] * 2
    assert metric_names_for(rows) == ["accuracy", "parse_failures"]
    assert corpus_value("parse_failures", rows) == pytest.approx(2 / 5)
    assert failure_warnings(rows) == [
        "2 of 5 replies could not be parsed (first: q2); they count as wrong"
    ]
    assert failure_warnings(rows[:2]) == []


def test_option_probabilities_are_judged_beside_the_reply() -> None:
    samples = [question(0), question(1), open_question(2, "7")]
    logps = [np.log([0.1, 0.3, 0.2]), np.log([0.3, 0.1, 0.2]), None]
    rows = choice_rows(samples, ["A", "B", "7"], logps, rules="mmmu")
    assert rows["correct"].tolist() == [False, True, True]
    assert rows["option_correct"].tolist() == [True, False, None]
    assert rows["option_log_probabilities"].iloc[2] is None
    np.testing.assert_allclose(rows["option_log_probabilities"].iloc[0], logps[0])
    assert corpus_value("accuracy_option", rows) == 0.5
    assert corpus_value("top1_probability", rows) == pytest.approx(0.5)
    assert corpus_value("nll", rows) == pytest.approx(-(np.log(0.5) + np.log(1 / 6)) / 2)


def test_log_probabilities_must_be_one_an_option() -> None:
    with pytest.raises(ValueError, match="sample q0: 2 log-probabilities for 3 options"):
        choice_rows([question(0)], ["A"], [np.log([0.5, 0.5])], rules="mmmu")


def test_a_question_is_right_when_all_its_orders_are() -> None:
    texts = ("a cat", "a dog", "a cow")
    samples, replies = [], []
    for number, wrong_shift in ((0, None), (1, 2), (2, 0)):
        for shift in range(3):
            options = texts[shift:] + texts[:shift]
            gold = "ABC"[options.index("a dog")]
            samples.append(
                question(number, gold, id=f"q{number}-{shift}", options=options, shift=shift)
            )
            replies.append("a cow" if shift == wrong_shift else "a dog.")
    rows = choice_rows(samples, replies, rules="mmbench")
    assert rows["shift"].tolist() == [0, 1, 2] * 3
    assert rows["correct"].tolist() == [True] * 5 + [False, False, True, True]
    assert corpus_value("accuracy", rows) == pytest.approx(1 / 3)
    assert corpus_value("accuracy_plain", rows) == pytest.approx(2 / 3)


def test_the_rules_are_those_of_the_benchmark() -> None:
    reply = "Answer: B"
    assert choice_rows([question(0)], [reply], rules="mmbench")["parsed"].tolist() == ["B"]
    assert choice_rows([question(0)], ["B) a dog"], rules="mmmu")["parsed"].tolist() == [None]
    assert choice_rows([question(0)], ["B) a dog"], rules="mmbench")["parsed"].tolist() == ["B"]


def test_random_guesses_are_drawn_with_the_official_seed_in_order() -> None:
    samples = [question(n, "ABC"[n % 3]) for n in range(60)]
    replies = ["A" if n % 4 == 0 else "no idea" for n in range(60)]
    rows = choice_rows(samples, replies, rules="mmmu", parse_failures="official")
    draws = random.Random(OFFICIAL_SEED)
    expected = [
        ("A" if n % 4 == 0 else draws.choice(["A", "B", "C"])) == "ABC"[n % 3] for n in range(60)
    ]
    assert rows["correct"].tolist() == expected
    # A guess is no answer: the share of failures stays what it was.
    assert rows["parsed"].isna().sum() == 45
    assert corpus_value("parse_failures", rows) == 0.75
    (warning,) = failure_warnings(rows)
    assert "count as right by the official rule, the others as wrong" in warning


def test_an_open_question_is_never_guessed() -> None:
    samples = [open_question(0, "5"), question(1)]
    rows = choice_rows(samples, ["", "no idea"], rules="mmmu", parse_failures="official")
    assert rows["correct"].iloc[0] == np.False_
    first = random.Random(OFFICIAL_SEED).choice(["A", "B", "C"])
    assert rows["correct"].iloc[1] == (first == "B")
