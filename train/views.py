"""Views: which answer of a pair is scored under which image.

A view's name is the answer's, with a suffix for another image than the pair's own: `chosen`,
`rejected`, `corrected`, `chosen_no_image`, `corrected_masked`, … Views under the same image share a
prefix, and so a forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cwdpo_bench.train.data import Masked, Pair

ANSWERS = ("chosen", "rejected", "corrected")
OWN, NO_IMAGE, MASKED, REJECTED = "own", "no_image", "masked", "rejected_image"
SUFFIXES = {"_no_image": NO_IMAGE, "_masked": MASKED}
FROZEN = frozenset({NO_IMAGE})
"""Images under which the policy is scored without gradient: V-DPO's stop-gradient term."""

MASK_SHARE = 0.3
"""Share of a masked image's pixels that is hidden, as in OPA-DPO's released settings."""


def answer_and_image(view: str) -> tuple[str, str]:
    """The parts of a view's name; the answer may be no known one."""
    for suffix, image in SUFFIXES.items():
        if view.endswith(suffix):
            return view.removesuffix(suffix), image
    return view, OWN


def has_image_contrast(pairs: Sequence[Pair]) -> bool:
    """Whether a rejected answer of these pairs stands under an image of its own."""
    return any(pair.rejected_images is not None for pair in pairs)


def by_image(views: Sequence[str], *, contrast: bool) -> dict[str, list[str]]:
    """The views in groups that share an image, in their order.

    Args:
        views: names.
        contrast: the rejected answers have images of their own (`has_image_contrast`).
    """
    groups: dict[str, list[str]] = {}
    for view in views:
        image = answer_and_image(view)[1]
        if view == "rejected" and contrast:
            image = REJECTED
        groups.setdefault(image, []).append(view)
    return groups


def answer_of(pair: Pair, view: str) -> str:
    """The text that a view scores; the pair has one."""
    text = getattr(pair, answer_and_image(view)[0])
    assert isinstance(text, str), f"{pair.where}: no answer for {view}"
    return text


def under_image(pair: Pair, image: str) -> Pair:
    """The pair with the images of a group of views."""
    if image == NO_IMAGE:
        return dataclasses.replace(pair, images=())
    if image == REJECTED and pair.rejected_images is not None:
        return dataclasses.replace(pair, images=pair.rejected_images)
    if image == MASKED:
        masked = tuple(Masked(source, MASK_SHARE, pair.id) for source in pair.images)
        return dataclasses.replace(pair, images=masked)
    return pair
