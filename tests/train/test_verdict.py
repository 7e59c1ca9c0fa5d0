"""The verdict on curves that have the disease and on curves that do not."""

from __future__ import annotations

from typing import Any

import pytest

from cwdpo_bench.train.sections import VerdictRules
from cwdpo_bench.train.verdict import Verdict, judge, worst

RULES = VerdictRules()


def _rows(
    chosen: list[float],
    argmax: list[float],
    rejected: list[float],
    error: float = 0.02,
    **columns: list[float],
) -> list[dict[str, Any]]:
    """Curves that start at ℓ̄ = −0.5, argmax −0.3, rejected −4, given as changes."""
    curves = zip([0.0, *chosen], [0.0, *argmax], [0.0, *rejected], strict=True)
    rows = [
        {
            "step": 25 * i,
            "chosen_mean_logp": -0.5 + w,
            "argmax_mean_logp": -0.3 + top,
            "rejected_mean_logp": -4 + loser,
            "chosen_change_error": error,
            "top1_probability": 0.78,
            "token_ece": 0.03,
        }
        for i, (w, top, loser) in enumerate(curves)
    ]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


DOWN = [-0.12, -0.2, -0.35, -0.5]
UP = [0.03, 0.05, 0.08, 0.1]
LOSER = [-0.8, -1.5, -2.0, -2.5]


def test_chosen_falls_while_the_top_rises_is_squeezing() -> None:
    found = judge(_rows(DOWN, UP, LOSER), RULES)
    assert found.name == "squeezing"
    assert "lost 0.50" in found.sentence
    assert found.evidence["chosen_change"] == pytest.approx(-0.5)
    assert found.evidence["argmax_change"] == pytest.approx(0.1)


def test_the_greedy_answers_gain_is_told_where_it_was_measured() -> None:
    nan = float("nan")
    greedy = [-0.4, nan, nan, nan, -0.25]
    found = judge(_rows(DOWN, UP, LOSER, greedy_mean_logp=greedy), RULES)
    assert "y* 0.15" in found.sentence
    assert found.evidence["greedy_change"] == pytest.approx(0.15)


def test_squeezing_is_not_forgotten_when_the_top_breaks_down_later() -> None:
    """As DPO at a high rate on the demo's world: sharper first, then lost."""
    found = judge(_rows([-0.15, -0.15, -0.5, -0.9], [0.06, 0.07, -0.1, -0.4], LOSER), RULES)
    assert found.name == "squeezing"
    assert "at steps 25 to 50" in found.sentence
    assert (found.evidence["first_step"], found.evidence["last_step"]) == (25, 50)
    assert "by step 100 the chosen answers have lost 0.90" in found.sentence


def test_a_fall_without_a_rise_of_the_top_is_displacement() -> None:
    found = judge(_rows(DOWN, [-0.05, -0.1, -0.2, -0.3], LOSER), RULES)
    assert found.name == "displacement"
    assert "no sign of squeezing" in found.sentence


@pytest.mark.parametrize(
    ("chosen", "argmax"),
    [
        ([0.02, 0.05, 0.06, 0.08], UP),  # both rise: sharper and better
        ([-0.01, -0.03, -0.04, -0.05], [0.01, 0.02, 0.02, 0.02]),  # as CW-DPO: hardly a fall
        ([-0.3, -0.4, -0.1, -0.05], UP),  # squeezed for a while, and recovered
        ([-0.01, -0.02, -0.03, -0.2], [0.0, 0.0, 0.0, 0.1]),  # one measurement is no curve
    ],
)
def test_curves_without_the_disease_are_healthy(chosen: list[float], argmax: list[float]) -> None:
    assert judge(_rows(chosen, argmax, LOSER), RULES).name == "healthy"


def test_a_fall_within_its_own_error_is_no_finding() -> None:
    assert judge(_rows(DOWN, UP, LOSER, error=0.3), RULES).name == "healthy"


def test_when_the_rejected_gain_on_the_chosen_it_is_not_squeezing() -> None:
    assert judge(_rows(DOWN, UP, [0.1, 0.2, 0.3, 0.4]), RULES).name == "displacement"


def test_an_objective_that_pushes_nothing_down_overfits() -> None:
    found = judge(_rows(DOWN, UP, LOSER), RULES, pushes_down=False)
    assert found.name == "displacement"
    assert "overfitting" in found.sentence


def test_the_thresholds_are_the_recipes() -> None:
    rows = _rows(DOWN, UP, LOSER)
    assert judge(rows, VerdictRules(fall=0.6)).name == "healthy"
    assert judge(rows, VerdictRules(rise=0.2)).name == "displacement"
    short = _rows([-0.2], [0.1], [-1.0])
    assert judge(short, VerdictRules(persist=1)).name == "squeezing"
    assert judge(short, RULES).name == "healthy"
    late = _rows([-0.01, -0.02, -0.2], [0.0, 0.0, 0.1], [-1.0, -1.0, -1.0])
    assert judge(late, VerdictRules(persist=1)).name == "squeezing"


def test_the_start_alone_says_nothing() -> None:
    assert judge(_rows([], [], []), RULES).sentence.startswith("nothing to judge")


def test_rows_without_rejected_answers_are_judged_on_the_chosen() -> None:
    nan = float("nan")
    found = judge(_rows(DOWN, [-x for x in UP], [nan] * 4), RULES)
    assert found.name == "displacement"
    assert "rejected_change" not in found.evidence


def test_the_gravest_stage_speaks_for_the_run() -> None:
    stages = [
        Verdict("healthy", "a", {}),
        Verdict("squeezing", "b", {}),
        Verdict("healthy", "c", {}),
    ]
    assert worst(stages).sentence == "b"
    assert worst([stages[0], stages[2]]).sentence == "c"
