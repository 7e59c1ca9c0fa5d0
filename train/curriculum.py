"""A stage's pairs in the order of their easiness, as the starting policy sees it (SPEC 1).

A pair is easy whose rejected answer is unlikely already: low ℓ̄_ref(y_l), or, by margin, a high
ℓ̄_ref(y_w) − ℓ̄_ref(y_l). The order is a function of the scores alone; pairs that are equally easy
keep the order of the data. Each pass over the pairs takes them in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.kept_pairs import taken
from cwdpo_bench.train.reference import Reference
from cwdpo_bench.train.sections import Data
from cwdpo_bench.train.terms import SequenceScores


def curriculum_order(scores: Reference, settings: Data) -> list[int]:
    """Positions of the pairs, the first to be trained on first.

    Args:
        scores: the starting policy's, of the views `chosen` and `rejected`.
        settings: `curriculum` is the direction, `easiness` the measure.
    """
    easiness = -scores["rejected"].mean_logp
    if settings.easiness == "margin":
        easiness = easiness + scores["chosen"].mean_logp
    easy_first = settings.curriculum == "easy_to_hard"
    order: list[int] = torch.argsort(easiness, descending=easy_first, stable=True).tolist()
    return order


def reordered(
    pairs: Sequence[Pair], reference: Reference | None, order: list[int]
) -> tuple[Sequence[Pair], Reference | None]:
    """Pairs and their reference scores in a new order."""
    moved = taken(pairs, order)
    if reference is None:
        return moved, None
    return moved, {
        view: SequenceScores(*(column[order] for column in scores))
        for view, scores in reference.items()
    }
