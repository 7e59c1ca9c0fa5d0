"""The order of a curriculum: by easiness, stable, in both directions."""

from __future__ import annotations

import pytest
import torch

from cwdpo_bench.train.curriculum import curriculum_order, reordered
from cwdpo_bench.train.data import Pair
from cwdpo_bench.train.sections import Data
from cwdpo_bench.train.terms import SequenceScores


def _scores(values: list[float]) -> SequenceScores:
    means = torch.tensor(values)
    return SequenceScores(10 * means, means)


SCORES = {
    "chosen": _scores([-1.0, -1.0, -3.0, -1.0]),
    "rejected": _scores([-2.0, -9.0, -5.0, -2.0]),
}


@pytest.mark.parametrize(
    ("direction", "easiness", "order"),
    [
        ("easy_to_hard", "rejected", [1, 2, 0, 3]),
        ("hard_to_easy", "rejected", [0, 3, 2, 1]),
        ("easy_to_hard", "margin", [1, 2, 0, 3]),
        ("hard_to_easy", "margin", [0, 3, 2, 1]),
    ],
)
def test_the_order_follows_the_easiness(direction: str, easiness: str, order: list[int]) -> None:
    settings = Data.model_validate({"curriculum": direction, "easiness": easiness})
    assert curriculum_order(SCORES, settings) == order


def test_margin_and_rejected_can_differ() -> None:
    scores = {"chosen": _scores([-1.0, -6.0]), "rejected": _scores([-4.0, -7.0])}
    assert curriculum_order(scores, Data(curriculum="easy_to_hard")) == [1, 0]
    by_margin = Data(curriculum="easy_to_hard", easiness="margin")
    assert curriculum_order(scores, by_margin) == [0, 1]


def test_the_reference_moves_with_its_pairs() -> None:
    pairs = [Pair(str(i), "", (), "", "a", "b", ("a",)) for i in range(4)]
    moved, reference = reordered(pairs, SCORES, [1, 2, 0, 3])
    assert [pair.id for pair in moved] == ["1", "2", "0", "3"]
    assert reference is not None
    assert reference["rejected"].mean_logp.tolist() == [-9.0, -5.0, -2.0, -2.0]
    assert reference["chosen"].logp.tolist() == [-10.0, -30.0, -10.0, -10.0]
    assert reordered(pairs, None, [3, 2, 1, 0])[1] is None
