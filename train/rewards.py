"""What a sampled answer is worth: a weighted sum of terms, each a number an answer.

`build_reward` turns the `rewards:` of a recipe and the rows of the training file into one function.
A `callable` term names `module:function`; the function's parameters say what it is given, each a
list with one entry an answer, and it returns that many numbers:

- `completions`: the answers' texts;
- `prompts`, `references`, `ids`: of the answers' rows (`references` are lists of texts);
- `images`: lists of the row's images, as paths or encoded bytes.

With `**kwargs` it is given all of them, so a reward function written for TRL's plain-text datasets
works here too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from cwdpo_bench.errors import UserError, nearest
from cwdpo_bench.evaluate.answers import parse_mmbench_choice
from cwdpo_bench.named import load_named
from cwdpo_bench.train.cider import CiderD, words_of
from cwdpo_bench.train.data import Pair, normalized
from cwdpo_bench.train.sections import (
    CallableTerm,
    CiderDTerm,
    ExactMatchTerm,
    LengthTerm,
    OptionCorrectTerm,
    RewardTerm,
)


class Rewards(NamedTuple):
    """Of N answers: the weighted sums [N], and every term [N] before its weight, by name."""

    total: np.ndarray
    terms: dict[str, np.ndarray]


RewardFunction = Callable[[Sequence[Pair], Sequence[str]], Rewards]
"""Rows and an answer to each, the same row more than once where it was answered so."""

_TermFunction = Callable[[Sequence[Pair], Sequence[str]], Sequence[float]]


def build_reward(terms: Sequence[RewardTerm], pairs: Sequence[Pair]) -> RewardFunction:
    """One function for all terms.

    Args:
        terms: of the recipe, one or more.
        pairs: all rows of the training data: the corpus of CIDEr-D's document frequencies.

    Raises:
        UserError: a term does not fit the rows, or a function cannot be loaded; the function that
            is returned raises it where a term is not a finite number, with the row and the answer.
    """
    functions: dict[str, tuple[float, _TermFunction]] = {}
    for term in terms:
        name = term.function if isinstance(term, CallableTerm) else term.kind
        if name in functions:
            raise UserError(f"rewards: {name!r} stands there twice; keep one and set its weight")
        functions[name] = (term.weight, _term_function(term, pairs))

    def reward(rows: Sequence[Pair], answers: Sequence[str]) -> Rewards:
        values = {
            name: _checked(name, function(rows, answers), rows, answers)
            for name, (_, function) in functions.items()
        }
        total = sum(functions[name][0] * value for name, value in values.items())
        return Rewards(np.asarray(total, dtype=np.float64), values)

    return reward


def _term_function(term: RewardTerm, pairs: Sequence[Pair]) -> _TermFunction:
    match term:
        case CiderDTerm():
            return _cider_d(pairs)
        case ExactMatchTerm():
            return _exact_match
        case OptionCorrectTerm():
            return _option_correct(pairs)
        case LengthTerm():
            return _length(term.words)
        case CallableTerm():
            return _callable(term.function)


def _checked(
    name: str, values: Sequence[float], rows: Sequence[Pair], answers: Sequence[str]
) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name!r}: did not return numbers ({error})") from error
    if array.shape != (len(answers),):
        raise UserError(
            f"reward {name!r}: returned shape {array.shape} for {len(answers)} answers; return one "
            "number an answer"
        )
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        row, answer = rows[bad[0]], answers[bad[0]]
        raise UserError(
            f"reward {name!r}: {array[bad[0]]} for sample {row.id} ({row.where}), answer "
            f"{answer!r}; make it a finite number"
        )
    return array


def _cider_d(pairs: Sequence[Pair]) -> _TermFunction:
    if len(pairs) < 2:
        raise UserError(
            "reward 'cider-d': document frequencies need two rows or more; bring more data"
        )
    metric = CiderD(pair.references for pair in pairs)
    return lambda rows, answers: [
        metric.score(answer, row.references) for row, answer in zip(rows, answers, strict=True)
    ]


def _exact_match(rows: Sequence[Pair], answers: Sequence[str]) -> list[float]:
    return [
        float(normalized(answer) in {normalized(text) for text in row.references})
        for row, answer in zip(rows, answers, strict=True)
    ]


_OPTION = re.compile(r"(?m)^\s*\(?([A-Z])[.):：]\s*(\S.*?)\s*$")


def options_of(prompt: str) -> dict[str, str]:
    """Letter → text of the options that a prompt lists a line each, A first; empty without any."""
    found = _OPTION.findall(prompt)
    letters = "".join(letter for letter, _ in found)
    is_list = len(found) > 1 and letters == ascii_uppercase[: len(found)]
    return dict(found) if is_list else {}


def _option_correct(pairs: Sequence[Pair]) -> _TermFunction:
    questions = [pair for pair in pairs if options_of(pair.prompt)]
    if not questions:
        raise UserError(
            "reward 'option-correct': no prompt lists options, a line each from 'A. …'; remove the "
            "term"
        )
    for pair in questions:
        _right_option(pair)

    def score(row: Pair, answer: str) -> float:
        options = options_of(row.prompt)
        # A row without options (a caption among the questions) is no matter of this term.
        return float(bool(options) and parse_mmbench_choice(answer, options) == _right_option(row))

    return lambda rows, answers: [
        score(row, answer) for row, answer in zip(rows, answers, strict=True)
    ]


def _right_option(pair: Pair) -> str:
    letter = parse_mmbench_choice(pair.references[0], options_of(pair.prompt))
    if letter is None:
        raise UserError(
            f"{pair.where}: reward 'option-correct': {pair.references[0]!r} names no option of the "
            "prompt; write the letter"
        )
    return letter


def _length(words: int | str) -> _TermFunction:
    def score(row: Pair, answer: str) -> float:
        if isinstance(words, int):
            wanted: float = words
        else:
            lengths = [len(words_of(text)) for text in row.references]
            wanted = max(1.0, sum(lengths) / len(lengths))
        return -abs(len(words_of(answer)) - wanted) / wanted

    return lambda rows, answers: [
        score(row, answer) for row, answer in zip(rows, answers, strict=True)
    ]


_ARGUMENTS: dict[str, Callable[[Pair], Any]] = {
    "prompts": lambda pair: pair.prompt,
    "references": lambda pair: list(pair.references),
    "ids": lambda pair: pair.id,
    "images": lambda pair: list(pair.images),
}


def _callable(name: str) -> _TermFunction:
    function = load_named(name, "function", callable)
    known = ["completions", *_ARGUMENTS]
    parameters = inspect.signature(function).parameters.values()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for parameter in parameters:
        is_named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_named and parameter.default is parameter.empty and parameter.name not in known:
            raise UserError(
                f"reward {name!r}: parameter {parameter.name!r} is not given to rewards; "
                f"{nearest(parameter.name, known)}"
            )
    wanted = known if everything else [p.name for p in parameters if p.name in known]

    def score(rows: Sequence[Pair], answers: Sequence[str]) -> Any:
        given: dict[str, Any] = {
            key: [_ARGUMENTS[key](row) for row in rows] for key in wanted if key != "completions"
        }
        if "completions" in wanted:
            given["completions"] = list(answers)
        return function(**given)

    return score
