"""Rewards: what each term is worth, sums, the user's own functions, and their mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from cwdpo_bench.errors import UserError
from cwdpo_bench.evaluate.captions import score_captions
from cwdpo_bench.evaluate.mmbench import mmbench_prompt
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.rewards import build_reward, options_of
from cwdpo_bench.train.sections import RewardTerm

TERMS = TypeAdapter(list[RewardTerm])


def _pair(name: str, *references: str, prompt: str = "Describe.") -> Pair:
    return Pair(
        id=name,
        where=f"pairs.jsonl: line {name}",
        images=(),
        prompt=prompt,
        chosen=references[0],
        rejected=None,
        references=references,
    )


CAPTIONS = [
    _pair("1", "A red circle left of a blue square.", "There is a red circle and a blue square."),
    _pair("2", "A green star.", "One green star on a white ground."),
    _pair("3", "Two yellow triangles above a red circle."),
]


def _terms(*terms: dict[str, Any]) -> list[RewardTerm]:
    return TERMS.validate_python(list(terms))


def test_cider_d_is_the_benchmark_s_own_figure() -> None:
    answers = ["A red circle on a blue square.", "A green star.", "A star."]
    scored = build_reward(_terms({"kind": "cider-d"}), CAPTIONS)(CAPTIONS, answers)
    rows = score_captions(
        {pair.id: pair.references for pair in CAPTIONS},
        {pair.id: answer for pair, answer in zip(CAPTIONS, answers, strict=True)},
    ).samples
    np.testing.assert_allclose(scored.total, rows["CIDEr"], atol=1e-9)


def test_cider_d_takes_its_frequencies_from_all_rows_not_from_those_scored() -> None:
    reward = build_reward(_terms({"kind": "cider-d"}), CAPTIONS)
    answers = ["A red circle on a blue square.", "A green star.", "A star."]
    whole = reward(CAPTIONS, answers).total
    for pair, answer, expected in zip(CAPTIONS, answers, whole, strict=True):
        assert reward([pair], [answer]).total[0] == expected


def test_exact_match_ignores_case_spacing_and_the_full_stop() -> None:
    reward = build_reward(_terms({"kind": "exact-match"}), CAPTIONS)
    answers = ["a green  STAR", "One green star on a white ground", "green star"]
    assert reward([CAPTIONS[1]] * 3, answers).total.tolist() == [1, 1, 0]


def test_option_correct_reads_the_letter_or_the_option_s_text() -> None:
    prompt = mmbench_prompt("What colour is it?", ["red", "dark red", "blue"])
    assert options_of(prompt) == {"A": "red", "B": "dark red", "C": "blue"}
    question = _pair("1", "B", prompt=prompt)
    reward = build_reward(_terms({"kind": "option-correct"}), [question, CAPTIONS[0]])
    answers = ["B", "b.", "dark red", "B. dark red", "The answer is (B)", "A", "red", "purple", ""]
    values = reward([question] * len(answers), answers).total
    assert values.tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    # A caption among the questions is no matter of this term.
    assert reward([CAPTIONS[0]], ["A red circle."]).total.tolist() == [0]


def test_option_correct_wants_a_right_answer_that_names_an_option() -> None:
    terms = _terms({"kind": "option-correct"})
    prompt = mmbench_prompt("What colour is it?", ["red", "blue"])
    with pytest.raises(UserError, match=r"pairs\.jsonl: line 7.*'green' names no option"):
        build_reward(terms, [_pair("7", "green", prompt=prompt)])
    with pytest.raises(UserError, match="no prompt lists options"):
        build_reward(terms, CAPTIONS)


def test_length_is_the_share_by_which_the_answer_misses() -> None:
    reward = build_reward(_terms({"kind": "length", "words": 4}), CAPTIONS)
    answers = ["one two three four", "one two.", "1 2 3 4 5 6 7 8"]
    assert reward([CAPTIONS[0]] * 3, answers).total.tolist() == [0, -0.5, -1]
    reward = build_reward(_terms({"kind": "length"}), CAPTIONS)
    # The references of the second row have three and seven words.
    assert reward([CAPTIONS[1]], ["a b c d e"]).total.tolist() == [0]


def test_the_sum_is_weighted_and_every_term_is_kept() -> None:
    terms = _terms(
        {"kind": "exact-match", "weight": 2.0}, {"kind": "length", "words": 3, "weight": 0.5}
    )
    scored = build_reward(terms, CAPTIONS)([CAPTIONS[1]] * 2, ["A green star.", "x"])
    assert scored.terms["exact-match"].tolist() == [1, 0]
    np.testing.assert_allclose(scored.terms["length"], [0, -2 / 3])
    np.testing.assert_allclose(scored.total, [2, -1 / 3])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory."""
    (tmp_path / "my_own_rewards.py").write_text(
        "def stars(completions, references, weight=1):\n"
        "    return [float('star' in text) for text in completions]\n"
        "def trl(prompts, completions, **kwargs):\n"
        "    return [len(ids) for ids in kwargs['ids']]\n"
        "def nan(completions):\n"
        "    return [0.0 if 'star' in text else float('nan') for text in completions]\n"
        "def short(completions):\n"
        "    return [1.0]\n"
        "def words(completions):\n"
        "    return ['a'] * len(completions)\n"
        "def asks(completions, refrences):\n"
        "    return [0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_own_rewards"


def _own(name: str, weight: float = 1.0) -> list[RewardTerm]:
    return _terms({"kind": "callable", "function": name, "weight": weight})


def test_a_function_is_given_what_its_parameters_name(own: str) -> None:
    answers = ["A green star.", "A circle."]
    reward = build_reward(_own(f"{own}:stars", 3.0), CAPTIONS)
    assert reward(CAPTIONS[:2], answers).total.tolist() == [3, 0]
    assert build_reward(_own(f"{own}:trl"), CAPTIONS)(CAPTIONS[:2], answers).total.tolist() == [
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("stras", "did you mean 'stars'"),
        ("asks", "'refrences'.*did you mean 'references'"),
        ("nan", "nan for sample 2.*line 2.*'A circle.'"),
        ("short", "one number an answer"),
        ("words", "did not return numbers"),
    ],
)
def test_a_function_s_fault_is_told(own: str, function: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_reward(_own(f"{own}:{function}"), CAPTIONS)(
            CAPTIONS[:2], ["A green star.", "A circle."]
        )


def test_a_module_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="no_such_rewards"):
        build_reward(_own("no_such_rewards:f"), CAPTIONS)


def test_a_term_stands_once() -> None:
    with pytest.raises(UserError, match="twice"):
        build_reward(_terms({"kind": "exact-match"}, {"kind": "exact-match"}), CAPTIONS)


def test_document_frequencies_need_two_rows() -> None:
    with pytest.raises(UserError, match="two rows"):
        build_reward(_terms({"kind": "cider-d"}), CAPTIONS[:1])
