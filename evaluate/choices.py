"""Answered questions as rows: what the reply says, if that is right, and the options' odds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from cwdpo_bench.calibration import cross_fit_temperature
from cwdpo_bench.calibration.temperature import pad_options
from cwdpo_bench.evaluate.answers import (
    is_open_answer,
    parse_mmbench_choice,
    parse_mmmu_choice,
    parse_mmmu_open,
    parse_pope_choice,
)
from cwdpo_bench.evaluate.samples import MULTIPLE_CHOICE, ChoiceSample

Rules = Literal["mmmu", "mmbench", "pope"]
PARSERS: dict[Rules, Callable[[str, Mapping[str, str]], str | None]] = {
    "mmmu": parse_mmmu_choice,
    "mmbench": parse_mmbench_choice,
    "pope": parse_pope_choice,
}

ParseFailures = Literal["wrong", "official"]
"""A reply in which nothing is found is wrong, or what the benchmark's own code makes of it."""

OFFICIAL_SEED = 42
"""MMMU's code seeds its guesses once, before the first subject."""


def choice_rows(
    samples: Sequence[ChoiceSample],
    replies: Sequence[str],
    option_log_probabilities: Sequence[np.ndarray | None] | None = None,
    *,
    rules: Rules,
    parse_failures: ParseFailures = "wrong",
) -> pd.DataFrame:
    """The rows of `samples/TASK.parquet` for choices, in the order of the samples.

    Args:
        samples: the questions; the circular orders of one share a cluster.
        replies: what the model said to each.
        option_log_probabilities: log p of each option's letter over the whole vocabulary, in the
            order of the options; None for an open question, None in all where nothing is known.
        rules: whose parser reads the replies.
        parse_failures: a multiple-choice reply that names no letter is wrong, or becomes what the
            benchmark's own code makes of it: a guess in MMMU's (which depends on the order of the
            samples), a yes in POPE's; MMBench's asks a language model, which is not done here. Its
            `parsed` is null either way.

    Returns:
        `id`, `cluster`, `groups`, `prompt`, `prediction`, `question_type`, `options`, `gold`,
        `parsed`, `correct`; with log-probabilities `option_log_probabilities`, `option_correct`,
        null for open questions, and `temperature` likewise, fitted on the other half of the
        questions (`cross_fit_temperature`); `shift` where there are circular orders; `said_yes`
        with POPE's rules.
    """
    official = parse_failures == "official"
    guesses = random.Random(OFFICIAL_SEED) if official and rules != "mmbench" else None
    judged = [
        _judge(sample, reply, rules, guesses)
        for sample, reply in zip(samples, replies, strict=True)
    ]
    rows = pd.DataFrame(
        {
            "id": [sample.id for sample in samples],
            "cluster": [sample.cluster for sample in samples],
            "groups": [list(sample.groups) for sample in samples],
            "prompt": [sample.prompt for sample in samples],
            "prediction": list(replies),
            "question_type": [sample.question_type for sample in samples],
            "options": [list(sample.options) for sample in samples],
            "gold": [sample.gold for sample in samples],
            "parsed": pd.Series([parsed for parsed, _ in judged], dtype=object),
            "correct": [correct for _, correct in judged],
        }
    )
    if option_log_probabilities is not None:
        for name, column in option_columns(samples, option_log_probabilities).items():
            rows[name] = column
    if rules == "pope":
        rows["said_yes"] = (rows["parsed"] == "A") | (rows["parsed"].isna() & official)
    if any(sample.shift for sample in samples):
        rows["shift"] = [sample.shift for sample in samples]
    return rows


def answered_rows(
    samples: Sequence[ChoiceSample], replies: Sequence[str], *, rules: Rules
) -> pd.DataFrame:
    """The rows of questions whose answers are hidden: what was said and how it is read.

    Returns:
        The columns of `choice_rows` but for `gold`, `correct` and what follows from them.
    """
    return choice_rows(samples, replies, rules=rules).drop(columns=["gold", "correct"])


def option_columns(
    samples: Sequence[ChoiceSample], option_log_probabilities: Sequence[np.ndarray | None]
) -> dict[str, pd.Series]:
    """What the options' log-probabilities add to the rows, null for open questions.

    Returns:
        `option_log_probabilities`, `option_correct`, and `temperature` where it can be fitted.
    """
    known = _of_choices(samples, option_log_probabilities)
    columns = {
        "option_log_probabilities": _objects(
            None if logps is None else [float(x) for x in logps] for logps in known
        ),
        "option_correct": _objects(
            None if logps is None else sample.letters[int(np.argmax(logps))] == sample.gold
            for sample, logps in zip(samples, known, strict=True)
        ),
    }
    temperatures = _held_out_temperatures(samples, known)
    if temperatures is not None:
        columns["temperature"] = _objects(temperatures)
    return columns


def _held_out_temperatures(
    samples: Sequence[ChoiceSample], log_probabilities: Sequence[np.ndarray | None]
) -> list[float | None] | None:
    """A temperature for each question with options, None in all where there is one cluster only."""
    asked = [place for place, logps in enumerate(log_probabilities) if logps is not None]
    if len({samples[place].cluster for place in asked}) < 2:
        return None
    padded = pad_options([logps for logps in log_probabilities if logps is not None])
    golds = [samples[place].letters.index(samples[place].gold) for place in asked]
    found = cross_fit_temperature(padded, golds, [samples[place].cluster for place in asked])
    temperatures: list[float | None] = [None] * len(samples)
    for place, temperature in zip(asked, found.tolist(), strict=True):
        temperatures[place] = temperature
    return temperatures


def failure_warnings(rows: pd.DataFrame) -> list[str]:
    """A line that says how many replies could not be parsed, and what became of them."""
    failed = rows["parsed"].isna()
    if not failed.any():
        return []
    guessed = int((failed & rows["correct"]).sum())
    first = rows["id"][failed].iloc[0]
    fate = f"{guessed} count as right by the official rule, the others" if guessed else "they count"
    what = f"{failed.sum()} of {len(rows)} replies could not be parsed (first: {first})"
    return [f"{what}; {fate} as wrong"]


def _judge(
    sample: ChoiceSample, reply: str, rules: Rules, guesses: random.Random | None
) -> tuple[str | None, bool]:
    """What the reply says (null where it can't be parsed) and whether that is right."""
    if sample.question_type != MULTIPLE_CHOICE:
        answers = parse_mmmu_open(reply)
        if answers is None:
            return None, False
        return json.dumps(answers, ensure_ascii=False), is_open_answer(answers, sample.gold)
    letter = PARSERS[rules](reply, dict(zip(sample.letters, sample.options, strict=True)))
    if letter is None and guesses is not None:
        guess = "A" if rules == "pope" else guesses.choice(sample.letters)
        return None, guess == sample.gold
    return letter, letter == sample.gold


def _of_choices(
    samples: Sequence[ChoiceSample], log_probabilities: Sequence[np.ndarray | None]
) -> list[np.ndarray | None]:
    """The log-probabilities of the questions that have options; each must have one an option."""
    known = []
    for sample, logps in zip(samples, log_probabilities, strict=True):
        of_options = logps if sample.question_type == MULTIPLE_CHOICE else None
        if of_options is not None and len(of_options) != len(sample.options):
            raise ValueError(
                f"sample {sample.id}: {len(of_options)} log-probabilities for "
                f"{len(sample.options)} options"
            )
        known.append(of_options)
    return known


def _objects(values: Iterable[object]) -> pd.Series:
    return pd.Series(list(values), dtype=object)
