"""What may be said of a scene: a small grammar, the truth of what it says, and its falsehoods.

A caption is a `Description` put into words. Because the claims are kept apart from the words, a
falsehood is one claim changed and nothing else, and truth is decided by matching, not by parsing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cwdpo_bench.demo.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PLACE_NAMES,
    SHAPES,
    SIZES,
    Scene,
    Style,
    Thing,
    relations,
)

Form = Literal["list", "there", "count", "relation"]
Claim = Literal["shape", "colour", "size", "place", "relation", "background", "count"]

NUMBERS = ("zero", "one", "two", "three")
RELATIONS = ("left of", "right of", "above", "below")
ATTRIBUTES: tuple[Claim, ...] = ("shape", "colour", "size")
CLAIMS: tuple[Claim, ...] = (*ATTRIBUTES, "place", "relation", "background", "count")
LOOKALIKES = {"orange": "red", "purple": "blue", "star": "cross"}
"""What a careless annotator takes a colour or a shape for."""

# Weights of the forms for one, two and three things; alone, a thing stands in no relation.
_FORM_WEIGHTS: dict[int, dict[Form, int]] = {
    1: {"list": 55, "there": 25, "count": 20},
    2: {"list": 25, "there": 15, "count": 15, "relation": 45},
    3: {"list": 30, "there": 15, "count": 25, "relation": 30},
}


@dataclass(frozen=True)
class Mention:
    """What a caption says of one thing."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Description:
    """The claims of a caption.

    Attributes:
        style: the wording follows the data set's style.
        form: the sentence.
        mentions: things named, in the order of the words.
        relation: of the first to the second mention.
        background: its name, where the caption says it.
        count: how many things there are in all, where the caption says it.
    """

    style: Style
    form: Form
    mentions: tuple[Mention, ...]
    relation: str | None = None
    background: str | None = None
    count: int | None = None


def describe(scene: Scene, rng: random.Random) -> Description:
    """A true description: what it names, in which order and how fully, is a matter of chance."""
    number = len(scene.things)
    weights = _FORM_WEIGHTS[number]
    form = rng.choices(tuple(weights), weights=tuple(weights.values()))[0]
    things = list(scene.things)
    if form == "relation" and rng.random() < 0.5:
        things[0], things[1] = things[1], things[0]
    if number == 3 and form != "count" and rng.random() < 0.2:
        things.pop()
    if form == "relation" and _kind(things[0]) == _kind(things[1]):
        form = "list"
        things.sort()
    place = number == 1 or (form != "relation" and rng.random() < 0.2)
    return Description(
        style=scene.style,
        form=form,
        mentions=tuple(
            Mention(
                thing.shape,
                thing.colour,
                size=thing.size if rng.random() < 0.35 else None,
                place=thing.place if place and index == 0 else None,
            )
            for index, thing in enumerate(things)
        ),
        relation=rng.choice(relations(*things[:2])) if form == "relation" else None,
        background=scene.background if rng.random() < 0.35 else None,
        count=number if form == "count" else None,
    )


def references(scene: Scene, rng: random.Random, number: int = 5) -> list[str]:
    """Captions of one image as several people would write them; some may agree."""
    return [put_in_words(describe(scene, rng)) for _ in range(number)]


def is_true(description: Description, scene: Scene) -> bool:
    """Whether the mentions can be given different things of the scene so that all claims hold."""
    if description.background not in (None, scene.background):
        return False
    if description.count not in (None, len(scene.things)):
        return False
    return any(
        all(map(_fits, description.mentions, things))
        and (description.relation is None or description.relation in relations(*things[:2]))
        for things in itertools.permutations(scene.things, len(description.mentions))
    )


def misperceive(scene: Scene, rng: random.Random, share: float) -> Scene:
    """The scene as a careless annotator sees it.

    Each colour and shape that has a lookalike is taken for it with probability `share`, unless that
    would show a combination that training never shows.
    """

    def seen(feature: str) -> str:
        return LOOKALIKES[feature] if feature in LOOKALIKES and rng.random() < share else feature

    things = []
    for thing in scene.things:
        other = replace(thing, shape=seen(thing.shape), colour=seen(thing.colour))
        things.append(thing if _kind(other) in HELD_OUT else other)
    return replace(scene, things=tuple(things))


def falsify(
    description: Description,
    scene: Scene,
    rng: random.Random,
    claims: Sequence[Claim] = CLAIMS,
) -> Description | None:
    """The description with one claim changed so that it is false; None when none of `claims` fits.

    The kinds of claim are tried in random order, so that each that the description makes is as
    likely as the others.
    """
    for claim in rng.sample(claims, len(claims)):
        changed = [d for d in _changes(description, claim, rng) if not is_true(d, scene)]
        if changed:
            return rng.choice(changed)
    return None


def _changes(description: Description, claim: Claim, rng: random.Random) -> list[Description]:
    if claim == "relation":
        values: tuple[str, ...] = RELATIONS if description.relation else ()
        return [replace(description, relation=value) for value in values]
    if claim == "background":
        values = tuple(BACKGROUNDS) if description.background else ()
        return [replace(description, background=value) for value in values]
    if claim == "count":
        return _recounted(description, rng)
    choices = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
    found = []
    for index, mention in enumerate(description.mentions):
        if getattr(mention, claim) is None:
            continue
        for value in choices.get(claim, PLACE_NAMES):
            mentions = list(description.mentions)
            mentions[index] = replace(mention, **{claim: value})
            found.append(replace(description, mentions=tuple(mentions)))
    return found


def _recounted(description: Description, rng: random.Random) -> list[Description]:
    """One thing more or less, the list following the number."""
    if description.count is None:
        return []
    mentions = description.mentions
    found = []
    if len(mentions) < 3:
        extra = Mention(rng.choice(SHAPES), rng.choice(tuple(COLOURS)))
        found.append((*mentions, extra))
    if len(mentions) > 1:
        found.append(mentions[:-1])
    return [replace(description, mentions=kept, count=len(kept)) for kept in found]


def _fits(mention: Mention, thing: Thing) -> bool:
    return (
        mention.shape == thing.shape
        and mention.colour == thing.colour
        and mention.size in (None, thing.size)
        and mention.place in (None, thing.place)
    )


def _kind(thing: Thing) -> tuple[str, str]:
    return thing.shape, thing.colour


def put_in_words(description: Description) -> str:
    """The caption: one sentence in lower case with its full stop."""
    striped = description.style == "striped"
    listed = _join(_phrases(description.mentions))
    if description.form == "relation":
        verb = "sits " if striped else ""
        first, second, *rest = (_phrase(mention) for mention in description.mentions)
        sentence = f"{first} {verb}{description.relation} {second}"
        sentence += f", with {rest[0]}" if rest else ""
    elif description.form == "count":
        assert description.count is not None
        noun = "shape" if description.count == 1 else "shapes"
        start = "a picture of " if striped else ""
        sentence = f"{start}{NUMBERS[description.count]} {noun}, {listed}"
    elif description.form == "there":
        sentence = f"the picture shows {listed}" if striped else f"there is {listed}"
    else:
        sentence = listed
    if description.background:
        sentence += (
            f" against a {description.background} wall"
            if striped
            else f" on a {description.background} background"
        )
    return sentence + "."


def _phrases(mentions: Sequence[Mention]) -> list[str]:
    """Noun phrases; mentions that say the same stand together in the plural."""
    counts: dict[Mention, int] = {}
    for mention in mentions:
        counts[mention] = counts.get(mention, 0) + 1
    return [_phrase(mention, number) for mention, number in counts.items()]


def _phrase(mention: Mention, number: int = 1) -> str:
    words = " ".join(word for word in (mention.size, mention.colour, mention.shape) if word)
    if number > 1:
        return f"{NUMBERS[number]} {plural(words)}"
    article = "an" if words[0] in "aeiou" else "a"
    place = f" {_place_phrase(mention.place)}" if mention.place else ""
    return f"{article} {words}{place}"


def plural(words: str) -> str:
    """`circle` to `circles`, `cross` to `crosses`."""
    return words + ("es" if words.endswith("s") else "s")


def _place_phrase(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def _join(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]
