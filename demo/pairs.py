"""Preference pairs: a true caption over a false one, hard or easy to tell from it.

Hard: one attribute, place, relation, count or background changed (`falsify`). Easy: the caption of
another scene, or the chosen words shuffled. On-policy negatives are made in training, not here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cwdpo_bench.demo.captions import describe, falsify, is_true, put_in_words
from cwdpo_bench.demo.world import Scene

EASY_SHARE = 0.7


@dataclass(frozen=True)
class CaptionPair:
    """Two captions of one scene: `chosen` is true, `rejected` false or no sentence."""

    chosen: str
    rejected: str
    kind: Literal["easy", "hard"]


def make_pairs(
    scenes: Sequence[Scene], rng: random.Random, easy_share: float = EASY_SHARE
) -> list[CaptionPair]:
    """One pair a scene, the given share of them easy (rounded).

    Args:
        scenes: two or more; the easy negatives are each other's captions.
        rng: the only source of chance.
        easy_share: between 0 and 1.
    """
    easy = set(rng.sample(range(len(scenes)), round(easy_share * len(scenes))))
    return [
        _easy_pair(scene, scenes, rng) if index in easy else _hard_pair(scene, rng)
        for index, scene in enumerate(scenes)
    ]


def _hard_pair(scene: Scene, rng: random.Random) -> CaptionPair:
    said = describe(scene, rng)
    # A caption always names a shape, and no scene holds all of them: some change is false.
    false = falsify(said, scene, rng)
    assert false is not None
    return CaptionPair(put_in_words(said), put_in_words(false), "hard")


def _easy_pair(scene: Scene, others: Sequence[Scene], rng: random.Random) -> CaptionPair:
    chosen = put_in_words(describe(scene, rng))
    if rng.random() < 0.5:
        return CaptionPair(chosen, _shuffled(chosen, rng), "easy")
    while True:
        other = describe(rng.choice(others), rng)
        if not is_true(other, scene):
            return CaptionPair(chosen, put_in_words(other), "easy")


def _shuffled(caption: str, rng: random.Random) -> str:
    """The same words in another order, the full stop kept at the end."""
    words = caption.removesuffix(".").split()
    while True:
        shuffled = " ".join(rng.sample(words, len(words))) + "."
        if shuffled != caption:
            return shuffled
