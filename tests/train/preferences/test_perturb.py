"""Rules that change one thing in a caption: cases by kind, properties, and the real SugarCrepe."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cwdpo_bench.errors import UserError
from cwdpo_bench.train.data import normalized
from cwdpo_bench.train.preferences.perturb import _RULES, KINDS, edit_size, perturb

SUGARCREPE = Path(__file__).parents[4] / "shared" / "real" / "sugarcrepe"
CAPTIONS = [
    "A red apple lies on a wooden table next to a cat.",
    "Two dogs sitting in front of a blue house.",
    "An elephant behind a tree.",
    "The man is riding a horse while a woman holds a green umbrella and a yellow bag.",
    "A pizza.",
    "three zebras under a tree",
]


def texts(kind, caption, seed=0):
    return [change.text for change in _RULES[kind](caption, random.Random(seed))]


@pytest.mark.parametrize(
    ("kind", "caption", "starts"),
    [
        ("replace_obj", "An elephant drinks.", {"A giraffe", "A zebra", "A bear", "A lion"}),
        ("replace_obj", "Two dogs run.", {"Two cats", "Two birds", "Two rabbits", "Two hamsters"}),
        ("replace_att", "Two dogs run.", {f"{n} dogs" for n in ("Three", "Four", "Five", "Six")}),
        ("replace_rel", "a cat under a bed", {"a cat in front", "a cat behind", "a cat on top"}),
        ("add_att", "A cat runs.", {"A tiny", "A huge", "A wet", "A dirty", "A muddy"}),
        ("add_obj", "A cat runs.", {"A cat runs with a"}),
        ("swap_obj", "a man chases a dog", {"a dog chases a man"}),
        ("swap_att", "a red car and a blue bus", {"a blue car and a red bus"}),
    ],
)
def test_each_kind_makes_its_change(kind, caption, starts):
    found = {text for seed in range(40) for text in texts(kind, caption, seed)}
    assert all(any(start in text for text in found) for start in starts), found


@pytest.mark.parametrize(
    ("kind", "caption"),
    [
        ("swap_obj", "a cat and a dog"),  # says the same the other way round
        ("swap_obj", "a dog near dogs"),  # the same thing
        ("swap_att", "a black and white cat"),  # one thing has both
        ("swap_att", "a red, white and blue flag"),
        ("replace_obj", "a plate of food"),  # "a bottle of food"
        ("replace_obj", "a kitchen table"),  # a compound
        ("replace_att", "a street full of people"),
        ("add_obj", "what is it?"),
        *((kind, "qwertz uiop") for kind in KINDS),
        *((kind, "") for kind in KINDS),
    ],
)
def test_what_would_be_nonsense_or_no_change_is_left(kind, caption):
    assert not texts(kind, caption)


def test_what_the_caption_names_is_no_replacement():
    named = "a fork, a spoon and a knife"
    assert not texts("replace_obj", named)


def test_articles_follow_the_new_word():
    found = {text for seed in range(40) for text in texts("replace_att", "an old boat", seed)}
    assert found == {"a young boat"}
    found = {t for seed in range(40) for t in texts("replace_obj", "A monkey sits.", seed)}
    assert "An elephant sits." in found
    assert not any(text.startswith(("A elephant", "An giraffe")) for text in found)


def test_shares_are_kept_where_rules_allow():
    captions = [f"A car stands behind the wooden bench {i}." for i in range(300)]
    wanted = {"replace_obj": 3, "replace_att": 1, "add_att": 2}
    found = perturb(captions, wanted, seed=1)
    counts = Counter(change.kind for change in found.changes if change)
    assert counts == {"replace_obj": 150, "replace_att": 50, "add_att": 100}
    assert not found.dropped
    assert perturb(captions, wanted, seed=1) == found
    assert perturb(captions, wanted, seed=2) != found


def test_captions_without_a_rule_are_counted():
    found = perturb(["A dog.", "Nothing of the list"], {"replace_obj": 1})
    assert found.changes[1] is None
    assert found.dropped == {"no rule applies": 1}


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"replace_ob": 1}, "replace_obj"),
        ({"replace_obj": -1, "add_att": 2}, "0 or more"),
        ({"replace_obj": float("nan")}, "0 or more"),
        ({"replace_obj": 0}, "no kind"),
        ({}, "no kind"),
    ],
)
def test_bad_shares_are_refused(shares, said):
    with pytest.raises(UserError, match=said):
        perturb(["A dog."], shares)


@given(st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=8), st.integers(0, 9))
def test_one_change_each_and_never_the_same_caption(captions, seed):
    found = perturb(captions, dict.fromkeys(KINDS, 1.0), seed=seed)
    for caption, change in zip(captions, found.changes, strict=True):
        assert change is not None
        assert change.kind in KINDS
        assert normalized(change.text) != normalized(caption)
        assert 1 <= edit_size(caption, change.text) <= 6


@pytest.mark.parametrize(
    ("before", "after", "size"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "a x c", 1),
        ("a b", "a b with a cat", 3),
        ("in front of it", "behind it", 3),
        ("a dog and a cat", "a cat and a dog", 2),
        ("A", "a", 0),
    ],
)
def test_edit_size_counts_words(before, after, size):
    assert edit_size(before, after) == size


@pytest.mark.skipif(not SUGARCREPE.is_dir(), reason="the real SugarCrepe captions are not here")
def test_real_captions_get_the_kinds_of_sugarcrepe():
    assert {path.stem for path in SUGARCREPE.glob("*.json")} == set(KINDS)
    captions = sorted(
        {
            row["caption"]
            for path in SUGARCREPE.glob("*.json")
            for row in json.loads(path.read_text()).values()
        }
    )
    found = perturb(captions, dict.fromkeys(KINDS, 1.0))
    changed = [(c, x) for c, x in zip(captions, found.changes, strict=True) if x is not None]
    assert len(changed) > 0.9 * len(captions)
    counts = Counter(change.kind for _, change in changed)
    assert min(counts.values()) > 0.04 * len(captions)
    for caption, change in changed:
        assert normalized(change.text) != normalized(caption)
        assert edit_size(caption, change.text) <= 8
        assert not _doubled(change.text) - _doubled(caption)


def _doubled(text):
    words = text.lower().split()
    return {"a a", "an a", "a an", "the the"} & {" ".join(two) for two in pairwise(words)}
