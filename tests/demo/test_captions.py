"""Captions: a parser of their words, written apart from the grammar, judges their truth."""

import itertools
import random
import re

import pytest

from cwdpo_bench.demo.captions import (
    CLAIMS,
    LOOKALIKES,
    describe,
    falsify,
    is_true,
    misperceive,
    put_in_words,
    references,
)
from cwdpo_bench.demo.pairs import make_pairs
from cwdpo_bench.demo.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    NOVEL_COLOURS,
    NOVEL_SHAPES,
    SHAPES,
    draw_scene,
)

_NUMBER = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_PLACES = "top left|top right|top|bottom left|bottom right|bottom|left|right|center"
_MENTION = re.compile(
    r"\b(?P<number>an?|two|three) (?:(?P<size>small|large) )?"
    rf"(?P<colour>{'|'.join([*COLOURS, *NOVEL_COLOURS])}) "
    rf"(?P<shape>{'|'.join([*SHAPES, *NOVEL_SHAPES])})(?:e?s)?\b"
    rf"(?: (?:at|in) the (?P<place>{_PLACES}))?"
)
_CELL = {
    (row, column): name
    for row, names in enumerate(
        (
            ("top left", "top", "top right"),
            ("left", "center", "right"),
            ("bottom left", "bottom", "bottom right"),
        )
    )
    for column, name in enumerate(names)
}


def _true(caption, scene):
    """Whether what the words say holds, judged from the text alone."""
    count = re.search(r"\b(one|two|three) shapes?,", caption)
    if count and _NUMBER[count[1]] != len(scene.things):
        return False
    background = re.search(rf"\b({'|'.join(BACKGROUNDS)}) (?:background|wall)", caption)
    if background and background[1] != scene.background:
        return False
    mentions = [m for m in _MENTION.finditer(caption) for _ in range(_NUMBER[m["number"]])]
    assert mentions, caption
    relation = re.search(r"(?<!top)(?<!bottom) (left of|right of|above|below) an? ", caption)
    return any(
        all(_matches(m, t) for m, t in zip(mentions, things, strict=True))
        and (relation is None or _related(relation[1], *things[:2]))
        for things in itertools.permutations(scene.things, len(mentions))
    )


def _matches(mention, thing):
    return (
        mention["shape"] == thing.shape
        and mention["colour"] == thing.colour
        and mention["size"] in (None, thing.size)
        and mention["place"] in (None, _CELL[thing.row, thing.column])
    )


def _related(relation, first, second):
    return {
        "left of": first.column < second.column,
        "right of": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[relation]


def _claims(said):
    return [said.relation, said.background, *(v for m in said.mentions for v in vars(m).values())]


def _scenes(number, split="test"):
    rng = random.Random(5)
    kinds = itertools.cycle(
        itertools.product(
            ("plain", "striped"), ("in-domain", "near-domain", "out-domain"), (False, True)
        )
    )
    return [
        draw_scene(rng, split, style=style, domain=domain, twins=twins)
        for (style, domain, twins), _ in zip(kinds, range(number), strict=False)
    ]


def test_references_are_true_of_their_scene():
    rng = random.Random(0)
    for scene in _scenes(200):
        for caption in references(scene, rng):
            assert _true(caption, scene), (caption, scene)


def test_references_of_an_image_disagree_in_their_words():
    rng = random.Random(0)
    distinct = [len(set(references(scene, rng))) for scene in _scenes(60)]
    assert sum(distinct) / len(distinct) > 3.5


def test_the_two_styles_do_not_share_their_sentences():
    rng = random.Random(0)
    plain = [s for s in _scenes(60) if s.style == "plain"]
    striped = [s for s in _scenes(60) if s.style == "striped"]
    assert any("wall" in c for s in striped for c in references(s, rng))
    assert not any("wall" in c for s in plain for c in references(s, rng))


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_falsehood_changes_one_claim_and_is_false(claim):
    rng = random.Random(0)
    found = 0
    for scene in _scenes(150):
        said = describe(scene, rng)
        false = falsify(said, scene, rng, [claim])
        if false is None:
            continue
        found += 1
        assert is_true(said, scene)
        assert not is_true(false, scene)
        assert not _true(put_in_words(false), scene), (put_in_words(false), scene)
        if claim != "count":
            assert len(said.mentions) == len(false.mentions)
            assert sum(a != b for a, b in zip(_claims(said), _claims(false), strict=True)) == 1
    assert found > 10


def test_a_careless_annotator_sees_lookalikes_in_the_stated_share():
    rng = random.Random(0)
    scenes = [draw_scene(rng, "pretraining") for _ in range(600)]
    taken = {feature: [0, 0] for feature in LOOKALIKES}
    for scene in scenes:
        seen = misperceive(scene, rng, 0.6)
        assert misperceive(scene, rng, 0.0) == scene
        assert (seen.background, seen.style) == (scene.background, scene.style)
        for thing, other in zip(scene.things, seen.things, strict=True):
            assert (other.shape, other.colour) not in HELD_OUT
            assert (other.place, other.size) == (thing.place, thing.size)
            for is_, was in ((other.shape, thing.shape), (other.colour, thing.colour)):
                assert is_ in (was, LOOKALIKES.get(was))
            # Without a second feature to be mistaken or a combination to be kept out.
            if thing.shape in ("circle", "square") and thing.colour in LOOKALIKES:
                taken[thing.colour][0] += other.colour != thing.colour
                taken[thing.colour][1] += 1
            elif thing.shape == "star" and thing.colour in ("green", "blue"):
                taken["star"][0] += other.shape != "star"
                taken["star"][1] += 1
    for mistaken, number in taken.values():
        assert number > 50
        assert 0.48 < mistaken / number < 0.72


def test_pairs_prefer_what_is_true_and_reject_what_is_not():
    scenes = _scenes(200, "pairs")
    rng = random.Random(0)
    pairs = make_pairs(scenes, rng, 0.7)
    assert sum(pair.kind == "easy" for pair in pairs) == 140
    for scene, pair in zip(scenes, pairs, strict=True):
        assert _true(pair.chosen, scene)
        assert pair.chosen != pair.rejected
        shuffled = sorted(pair.chosen[:-1].split()) == sorted(pair.rejected[:-1].split())
        if pair.kind == "hard" or not shuffled:
            assert not _true(pair.rejected, scene), (pair, scene)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_easy_pairs_is_what_was_asked(share):
    pairs = make_pairs(_scenes(30, "pairs"), random.Random(0), share)
    assert sum(pair.kind == "easy" for pair in pairs) == round(30 * share)
