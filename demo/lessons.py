"""How to find an option's letter: guidance that only pre-training gets, thrown away with it.

To answer `B` a model must know the answer (`red`), find the line that says so, and read its letter.
From letters alone a model this small does not put the three together (the answers stay at chance
for more than a thousand steps). So pre-training also says what should be known and looked at on the
way, at the position that predicts the first token of the answer: after layer `KNOWS` the output
head should read the answer's words there, and layer `LOOKS` should look at the right option's
words. Reading lessons, questions without an image that name their answer, teach the last step
alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cwdpo_bench.demo.questions import DIRECTIONS, NAMES, NUMBERS_IN_DIGITS, Question
from cwdpo_bench.demo.world import COLOURS, PLACE_NAMES
from cwdpo_bench.evaluate.mmmu import lettered

KNOWS = 2
"""Layers after which the answer's words should be known."""
LOOKS = 2
"""The layer (from 0) that should look at the right option, with its first `HEADS` heads."""
HEADS = 2
LOOK_WEIGHT = 0.5

_POOLS = (
    PLACE_NAMES,
    tuple(DIRECTIONS.values()),
    NUMBERS_IN_DIGITS,
    tuple(COLOURS),
    NAMES,
)


class Lesson(NamedTuple):
    """What is to be known and looked at before a question is answered.

    Attributes:
        words: token ids of the right answer as they stand in a text.
        option: positions in the prompt of the right option's words; empty for an open question.
    """

    words: list[int]
    option: list[int]


def reading_lesson(rng: random.Random) -> Question:
    """A question that names its answer, so that only the letter is to be found."""
    pool = rng.choice(_POOLS)
    options = rng.sample(pool, rng.choice((2, 3, 4)))
    truth = rng.choice(options)
    return Question("reading", f"Where is {truth}?", truth, tuple(options))


def lesson_of(question: Question, prompt: str, tokenizer: Any) -> Lesson:
    """The lesson of a question in a prompt that holds its options as lines `A. text`."""
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    space = tokenizer.convert_ids_to_tokens(tokenizer(" 0", add_special_tokens=False)["input_ids"])
    # A digit stands behind a blank of its own, which says nothing of the answer.
    blanks = {space[0]} if len(space) > 1 else set()
    words = tokenizer(f" {question.truth}", add_special_tokens=False)["input_ids"]
    words = [w for w in words if tokenizer.convert_ids_to_tokens(w) not in blanks]
    if not question.options:
        return Lesson(words, [])
    before = question.options[: question.options.index(question.truth)]
    start = prompt.index(lettered(question.options)) + len(lettered((*before, "")))
    end = start + len(question.truth)
    option = [
        position
        for position, (first, last) in enumerate(encoded["offset_mapping"])
        if first < end and last > start and tokens[position] not in blanks
    ]
    return Lesson(words, option)


def lesson_loss(
    known: torch.Tensor, looked: torch.Tensor, head: Any, lessons: Sequence[Lesson]
) -> torch.Tensor:
    """Cross-entropy of the answer's words plus that of looking at the right option.

    Args:
        known: [B, H] normalised hidden states after layer `KNOWS`, where the answer starts.
        looked: [B, heads, S] attention of layer `LOOKS` from there.
        head: the output head.
        lessons: of the B questions.
    """
    log_p = head(known).log_softmax(-1)
    said = torch.stack(
        [-log_p[row, lesson.words].mean() for row, lesson in enumerate(lessons)]
    ).mean()
    mass = [
        looked[row, :HEADS][:, lesson.option].sum(-1)
        for row, lesson in enumerate(lessons)
        if lesson.option
    ]
    if not mass:
        return said
    return said - LOOK_WEIGHT * torch.stack(mass).clamp(min=1e-6).log().mean()
