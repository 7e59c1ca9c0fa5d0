"""What a free reply says: a letter of the options, or an answer to an open question.

MMMU's rules are those of its repository (MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py; Yue et al.,
CVPR 2024), to the letter, oddities included, because its published figures rest on them. One thing
differs: a reply in which nothing is found is None here. The official code guesses at random; who
wants that asks `evaluate/choices.py` for it.

MMBench's own code asks a language model where its rules fail (Liu et al., ECCV 2024, section 4);
the rules here only take what is said plainly.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

Answer = str | float
"""A candidate answer to an open question: lower-case text, or a number rounded to two decimals."""

DISCIPLINES: dict[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""MMMU's six disciplines and their thirty subjects."""

# --- MMMU, multiple choice -----------------------------------------------------------------------

_EDGE_MARKS = (",", ".", "!", "?", ";", ":", "'")
_LONG_REPLY = 5
"""Only in a reply of more words than this the options' texts are looked for."""


def parse_mmmu_choice(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that a reply names by MMMU's rules, or None.

    A letter in brackets counts before a letter between spaces, and that before an option's text in
    a long reply. Of several found by the same rule the last one in the reply counts.

    Args:
        reply: what the model said.
        options: letter → text, in order.
    """
    for mark in _EDGE_MARKS:
        reply = reply.strip(mark)
    reply = f" {reply} "
    lower = reply.lower()
    rules = [
        {letter: reply.rfind(f"({letter})") for letter in options},
        {letter: reply.rfind(f" {letter} ") for letter in options},
    ]
    if len(reply.split()) > _LONG_REPLY:
        rules.append({letter: lower.rfind(text.lower()) for letter, text in options.items()})
    for places in rules:
        last = max(places, key=places.__getitem__)
        if places[last] >= 0:
            return last
    return None


# --- MMMU, open questions ------------------------------------------------------------------------

_INDICATORS = (
    "could be ",
    "so ",
    "is ",
    "thus ",
    "therefore ",
    "final ",
    "answer ",
    "result ",
)
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With commas between thousands; scientific; plain."""


def parse_mmmu_open(reply: str) -> list[Answer] | None:
    """The candidate answers in a reply to an open question, sorted, or None for a blank reply.

    They are the tails of its lines after a word like "is" or "answer" (the whole reply where there
    is none), and every number in them.
    """
    phrases = _key_phrases(reply)
    numbers = [
        number for text in phrases for pattern in _NUMBERS for number in pattern.findall(text)
    ]
    answers = {answer for text in phrases + numbers for answer in normalize_answer(text)}
    if not any(str(answer).strip() for answer in answers):
        return None
    return sorted(answers, key=lambda answer: (isinstance(answer, float), str(answer)))


def _key_phrases(reply: str) -> list[str]:
    text = reply.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        # The last line may be an equation.
        indicators = (*_INDICATORS, "=") if number == len(lines) else _INDICATORS
        phrase = _shortest_tail(line, indicators)
        if phrase and phrase not in _TRIVIAL:
            phrases.append(phrase)
    return phrases or [text]


def _shortest_tail(line: str, indicators: Sequence[str]) -> str:
    """The shortest text behind the last place of an indicator.

    An empty tail gives way to any later one, but wins over an earlier one, as in the official code.
    """
    shortest = ""
    for indicator in indicators:
        if indicator in line:
            tail = line.rsplit(indicator, 1)[1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def normalize_answer(text: str) -> list[Answer]:
    """A number rounded to two decimals, else lower-case text.

    One character becomes two texts with a space beside it, so that it is not found in any word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_open_answer(answers: Sequence[Answer], gold: str) -> bool:
    """Whether a candidate equals an accepted number, or holds an accepted text.

    Args:
        answers: from `parse_mmmu_open`.
        gold: one answer, or the text of a Python list of accepted ones.
    """
    accepted = [answer for text in accepted_answers(gold) for answer in normalize_answer(text)]
    return any(
        any(isinstance(right, str) and right in answer for right in accepted)
        if isinstance(answer, str)
        else answer in accepted
        for answer in answers
    )


def accepted_answers(gold: str) -> list[str]:
    """The answers that count: MMMU writes several as the text of a Python list."""
    if gold.startswith("["):
        try:
            texts = ast.literal_eval(gold)
        except (ValueError, SyntaxError):
            return [gold]
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return texts
    return [gold]


# --- MMBench -------------------------------------------------------------------------------------

_ANSWER_WORDS = r"(?:answer|option|choice)(?:\s+is)?\s*[:：]?\s*\(?"
_AFTER_A = r"(?=\s*(?:\Z|[.):：,;!\n]|(?:is|because|since)\b))"
"""What may follow an A that is the letter: "the answer is a cat" names none."""


def parse_mmbench_choice(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter that a reply names plainly, or None.

    Taken, in this order: a lone letter ("A", "a.", "(A)"); an option's text alone, with or without
    its letter; "the answer is A", "Answer: (A)", "option A"; a letter at the start of a line with a
    mark behind it ("A. a cat"); a letter in brackets; the one option whose text stands in the
    reply. A rule that finds two different letters says None.

    Args:
        reply: what the model said.
        options: letter → text, in order.
    """
    reply = reply.strip()
    letters = "".join(options)
    lone = _bare(reply)
    if len(lone) == 1 and lone.upper() in options:
        return lone.upper()
    rules = (
        {letter for letter, text in options.items() if _says(reply, letter, text)},
        set(re.findall(rf"(?i:{_ANSWER_WORDS})(A{_AFTER_A}|[{letters[1:]}]\b)", reply)),
        set(re.findall(rf"(?m)^([{letters}])[.):：,](?:\s|$)", reply)),
        set(re.findall(rf"\(([{letters}])\)", reply)),
        _quoted(reply, options),
    )
    for found in rules:
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _bare(text: str) -> str:
    return text.strip(" \t\n.,:;!?()[]'\"*").casefold()


def _says(reply: str, letter: str, text: str) -> bool:
    """Whether the reply is the option and nothing else."""
    if _bare(reply) == _bare(text):
        return True
    start = re.match(rf"\(?{letter}[.):：,]?\s+", reply)
    return start is not None and _bare(reply[start.end() :]) == _bare(text)


def _quoted(reply: str, options: Mapping[str, str]) -> set[str]:
    """The options whose text stands in the reply; "red" does not where "dark red" does."""
    found = {
        letter: words
        for letter, text in options.items()
        if (words := _bare(text))
        and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", reply.casefold())
    }
    return {
        letter
        for letter, words in found.items()
        if not any(words != other and words in other for other in found.values())
    }


# --- POPE ----------------------------------------------------------------------------------------

_DENIALS = frozenset({"no", "not"})


def parse_pope_choice(reply: str, options: Mapping[str, str]) -> str | None:
    """The letter of "No" or "Yes" in the reply's first sentence, or None.

    POPE's own code (AoiDragon/POPE, evaluate.py) looks for "no" and "not" there and takes every
    other reply for a yes; here a yes has to be said. Marks and capitals make no difference.

    Args:
        reply: what the model said.
        options: letter → "Yes" and "No".
    """
    first = reply.strip().split(".")[0]
    words = set(re.findall(r"[^\W_]+", first.casefold()))
    letters = {text.casefold(): letter for letter, text in options.items()}
    if words & _DENIALS:
        return letters["no"]
    return letters["yes"] if "yes" in words else None
