"""What a stage trains on, found from the policy that it starts from.

A threshold or own answers are made where the recipe wants them, the reference scores every pair,
and the filter leaves pairs out; in this order, each once, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cwdpo_bench.train.corrections import usable_pairs, with_own_answers
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.kept_pairs import taken
from cwdpo_bench.train.negatives import filter_pairs, sample_answers, without
from cwdpo_bench.train.reference import Reference
from cwdpo_bench.train.sections import OPADPO, OPASFT, Objective
from cwdpo_bench.train.smoothing import sample_for_threshold, wants_threshold, with_threshold
from cwdpo_bench.train.terms import needed_views, needs_reference
from cwdpo_bench.vlm import VLM

Scorer = Callable[[Sequence[Pair], Sequence[str]], Reference]
"""Scores of pairs, of the given views, under the policy that the stage starts from."""


class StageData(NamedTuple):
    """What a stage trains on.

    Attributes:
        objective: with every `auto` of its own as a number.
        pairs: in the order of the data.
        reference: scores of the pairs, of every view of the objective; None where it needs none.
        easy_below: ℓ̄_ref under which a rejected answer is extremely easy; None without a filter.
        record: what the provenance says of it.
    """

    objective: Objective
    pairs: Sequence[Pair]
    reference: Reference | None
    easy_below: float | None
    record: dict[str, Any]


def stage_data(
    key: str,
    objective: Objective,
    pairs: Sequence[Pair],
    vlm: VLM,
    *,
    folder: Path,
    seed: int,
    batch_size: int,
    score: Scorer,
    score_and_keep: Scorer,
) -> StageData:
    """Make a stage's data.

    Args:
        key: under which the stage stands in the recipe.
        objective: as the recipe has it.
        pairs: the stage's share of the data.
        vlm: the policy that the stage starts from.
        folder: of the stage.
        seed: of the run.
        batch_size: pairs whose mean a constraint sees at a time.
        score: computes scores.
        score_and_keep: computes them or finds them on disk; for the reference.

    Raises:
        UserError: no pair is left.
    """
    record: dict[str, Any] = {}
    if wants_threshold(objective):
        scores = score(sample_for_threshold(pairs, seed), ["rejected"])
        objective = with_threshold(objective, scores["rejected"], batch_size)
    if isinstance(objective, OPASFT | OPADPO):
        own = objective.own
        pairs, unusable = with_own_answers(
            pairs, folder, lambda rows: sample_answers(vlm, rows, own, seed=seed)
        )
        if isinstance(objective, OPADPO):
            pairs = usable_pairs(key, pairs, unusable)
        record["own_answers"] = {"pairs": len(pairs), "unusable": unusable}
    reference = None
    if needs_reference(objective):
        # The policy of now is the reference: π_ref ← π_θ between the stages (SPEC 1).
        reference = score_and_keep(pairs, needed_views(objective))
    easy_below = None
    if (rule := getattr(objective, "filter", None)) is not None:
        scores = reference or score(pairs, ["rejected"])
        kept = filter_pairs(pairs, scores["rejected"].mean_logp, rule)
        pairs = taken(pairs, kept.places)
        reference = None if reference is None else without(reference, kept)
        easy_below = kept.easy_below
        record["filter"] = {
            "pairs": len(pairs),
            "dropped": kept.dropped,
            "easy_below": kept.easy_below,
        }
    return StageData(objective, pairs, reference, easy_below, record)
