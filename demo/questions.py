"""Questions about a scene, multiple-choice or open, with an answer that the scene proves.

Kinds: `count`, `arithmetic`, `colour`, `place`, `relation`, `odd-one-out`, `presence`. A kind may
not fit a scene (no shape stands alone in its row, say); then there is no question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from cwdpo_bench.demo.captions import NUMBERS, plural
from cwdpo_bench.demo.world import COLOURS, PLACE_NAMES, SHAPES, Scene, Thing, relations

DIRECTIONS = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        kind: one of `KINDS`.
        text: the question alone.
        truth: the right answer in words or digits.
        options: two to four texts, `truth` among them; empty for an open question.
    """

    kind: str
    text: str
    truth: str
    options: tuple[str, ...] = ()

    @property
    def marked_text(self) -> str:
        """The text with MMMU's mark of where the image belongs."""
        return f"<image 1> {self.text}"

    @property
    def hint(self) -> str | None:
        """What MMBench prints before the question, where something needs saying."""
        return HINTS.get(self.kind)

    @property
    def answer(self) -> str:
        """What a right reply says: the letter of an option, or the text of an open answer."""
        return ascii_uppercase[self.options.index(self.truth)] if self.options else self.truth


@dataclass(frozen=True)
class _Draft:
    text: str
    truth: str
    wrong: tuple[str, ...]


def ask(scene: Scene, kind: str, rng: random.Random, *, is_open: bool = False) -> Question | None:
    """A question of one kind, or None where the scene gives no clear answer."""
    draft = KINDS[kind](scene, rng)
    if draft is None:
        return None
    if is_open:
        return Question(kind, draft.text, draft.truth)
    number = min(rng.choice((2, 3, 3)), len(draft.wrong))
    options = [draft.truth, *rng.sample(draft.wrong, number)]
    rng.shuffle(options)
    return Question(kind, draft.text, draft.truth, tuple(options))


def misread(question: Question, rng: random.Random) -> Question:
    """The question with a wrong answer taken for the truth, as a careless annotator would."""
    wrong = [option for option in question.options if option != question.truth]
    if not wrong:
        others = NUMBERS_IN_DIGITS if question.truth.isdigit() else tuple(COLOURS)
        wrong = [other for other in others if other != question.truth]
    return Question(question.kind, question.text, rng.choice(wrong), question.options)


NUMBERS_IN_DIGITS = ("0", "1", "2", "3", "4", "5", "6")


def _numbered(text: str, truth: int, highest: int) -> _Draft:
    wrong = tuple(digit for digit in NUMBERS_IN_DIGITS[: highest + 1] if digit != str(truth))
    return _Draft(text, str(truth), wrong)


def _count(scene: Scene, rng: random.Random) -> _Draft:
    about = rng.choice(("all", "shape", "colour"))
    if about == "all":
        return _numbered("How many shapes are there?", len(scene.things), 4)
    # Asking about what is there most of the time keeps zero from being the usual answer.
    thing = rng.choice(scene.things)
    if about == "shape":
        shape = rng.choice(SHAPES) if rng.random() < 0.2 else thing.shape
        number = sum(t.shape == shape for t in scene.things)
        return _numbered(f"How many {plural(shape)} are there?", number, 3)
    colour = rng.choice(tuple(COLOURS)) if rng.random() < 0.2 else thing.colour
    number = sum(t.colour == colour for t in scene.things)
    return _numbered(f"How many {colour} shapes are there?", number, 3)


def _arithmetic(scene: Scene, rng: random.Random) -> _Draft:
    number = len(scene.things)
    change = rng.choice((1, 2, -1))
    if change > 0:
        text = f"How many shapes are there with {NUMBERS[change]} more?"
    else:
        text = "How many shapes are there with one less?"
    return _numbered(text, number + change, 5)


def _colour(scene: Scene, rng: random.Random) -> _Draft | None:
    thing = _only(scene, rng, lambda t: t.shape)
    if thing is None:
        return None
    wrong = tuple(colour for colour in COLOURS if colour != thing.colour)
    return _Draft(f"What color is the {thing.shape}?", thing.colour, wrong)


def _place(scene: Scene, rng: random.Random) -> _Draft | None:
    thing = _only(scene, rng, lambda t: (t.colour, t.shape))
    if thing is None:
        return None
    wrong = tuple(name for name in PLACE_NAMES if name != thing.place)
    return _Draft(f"Where is the {thing_name(thing)}?", thing.place, wrong)


def _relation(scene: Scene, rng: random.Random) -> _Draft | None:
    # Only where one relation holds is one option right: the two share a row or a column.
    aligned = [
        (first, second)
        for first in scene.things
        for second in scene.things
        if first != second
        and len(relations(first, second)) == 1
        and all(
            thing_name(t) != thing_name(o) for t in (first, second) for o in scene.things if o != t
        )
    ]
    if not aligned:
        return None
    first, second = rng.choice(aligned)
    truth = DIRECTIONS[relations(first, second)[0]]
    wrong = tuple(word for word in DIRECTIONS.values() if word != truth)
    return _Draft(f"Where is the {thing_name(first)} from the {thing_name(second)}?", truth, wrong)


def _odd_one_out(scene: Scene, rng: random.Random) -> _Draft | None:
    names = [thing_name(thing) for thing in scene.things]
    odd = [name for name in names if names.count(name) == 1]
    twins = sorted({name for name in names if names.count(name) == 2})
    if len(odd) != 1 or not twins:
        return None
    return _Draft("Which is the odd one out?", odd[0], (twins[0], *_absent(scene, rng, 2)))


def _presence(scene: Scene, rng: random.Random) -> _Draft:
    truth = thing_name(rng.choice(scene.things))
    return _Draft("Which of these is in the picture?", truth, tuple(_absent(scene, rng, 3)))


def _absent(scene: Scene, rng: random.Random, number: int) -> list[str]:
    """Names of things that are not there."""
    present = {thing_name(thing) for thing in scene.things}
    return rng.sample([name for name in NAMES if name not in present], number)


def _only(scene: Scene, rng: random.Random, feature: Callable[[Thing], object]) -> Thing | None:
    """A thing that has its `feature` for itself, so that `the` points at it."""
    features = [feature(thing) for thing in scene.things]
    alone = [t for t in scene.things if features.count(feature(t)) == 1]
    return rng.choice(alone) if alone else None


def thing_name(thing: Thing) -> str:
    """`red circle`."""
    return f"{thing.colour} {thing.shape}"


KINDS: dict[str, Callable[[Scene, random.Random], _Draft | None]] = {
    "count": _count,
    "arithmetic": _arithmetic,
    "colour": _colour,
    "place": _place,
    "relation": _relation,
    "odd-one-out": _odd_one_out,
    "presence": _presence,
}
HINTS = {"relation": "Directions are those of the viewer."}
OPEN_KINDS: Sequence[str] = ("count", "arithmetic", "colour")
"""Kinds that can be asked without options."""
