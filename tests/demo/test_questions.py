"""Questions: the answer is read off the scene again, from the words of the question."""

import random
import re

import pytest

from cwdpo_bench.demo.questions import KINDS, OPEN_KINDS, ask, misread
from cwdpo_bench.demo.world import draw_scene


def _answers(text, options, scene):
    """Every option that is right, by reading the question."""
    things = scene.things
    names = [f"{t.colour} {t.shape}" for t in things]
    places = {name: thing.place for name, thing in zip(names, things, strict=True)}
    if text == "How many shapes are there?":
        return [str(len(things))]
    if change := re.fullmatch(r"How many shapes are there with (one|two) (more|less)\?", text):
        step = {"one": 1, "two": 2}[change[1]] * (1 if change[2] == "more" else -1)
        return [str(len(things) + step)]
    if colour := re.fullmatch(r"How many (\w+) shapes are there\?", text):
        return [str(sum(t.colour == colour[1] for t in things))]
    if shape := re.fullmatch(r"How many (\w+?)(?:(?<=cross)es|s) are there\?", text):
        return [str(sum(t.shape == shape[1] for t in things))]
    if shape := re.fullmatch(r"What color is the (\w+)\?", text):
        return [t.colour for t in things if t.shape == shape[1]]
    if pair := re.fullmatch(r"Where is the (\w+ \w+) from the (\w+ \w+)\?", text):
        (first,) = [t for t, n in zip(things, names, strict=True) if n == pair[1]]
        (second,) = [t for t, n in zip(things, names, strict=True) if n == pair[2]]
        holds = {
            "left": first.column < second.column,
            "right": first.column > second.column,
            "above": first.row < second.row,
            "below": first.row > second.row,
        }
        return [word for word in options if holds[word]]
    if name := re.fullmatch(r"Where is the (\w+ \w+)\?", text):
        assert names.count(name[1]) == 1
        return [places[name[1]]]
    if text == "Which is the odd one out?":
        return [o for o in options if names.count(o) == 1]
    assert text == "Which of these is in the picture?"
    return [o for o in options if o in names]


@pytest.mark.parametrize("kind", KINDS)
def test_one_option_and_no_other_is_right(kind):
    rng = random.Random(0)
    asked = []
    while len(asked) < 150:
        scene = draw_scene(rng, "test", twins=rng.random() < 0.3)
        question = ask(scene, kind, rng)
        if question is None:
            continue
        asked.append(question)
        assert 2 <= len(question.options) <= 4
        assert len(set(question.options)) == len(question.options)
        right = _answers(question.text, question.options, scene)
        assert set(right) & set(question.options) == {question.truth}
        assert question.options["ABCD".index(question.answer)] == question.truth
    for letter in "ABC":
        share = sum(question.answer == letter for question in asked) / len(asked)
        assert 0.15 < share < 0.55


@pytest.mark.parametrize("kind", OPEN_KINDS)
def test_an_open_question_is_answered_in_a_word(kind):
    rng = random.Random(1)
    for _ in range(50):
        scene = draw_scene(rng, "test")
        question = ask(scene, kind, rng, is_open=True)
        if question is not None:
            assert question.options == ()
            assert _answers(question.text, (), scene) == [question.answer]


def test_a_misread_question_is_the_same_question_with_a_wrong_answer():
    rng = random.Random(2)
    for kind in KINDS:
        for is_open in {False, kind in OPEN_KINDS}:
            scene = draw_scene(rng, "test", twins=True, count=3)
            question = ask(scene, kind, rng, is_open=is_open)
            if question is None:
                continue
            wrong = misread(question, rng)
            assert (wrong.text, wrong.options) == (question.text, question.options)
            assert wrong.answer != question.answer
