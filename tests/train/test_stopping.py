"""When a stage stops, and which measurement is its best."""

from __future__ import annotations

from typing import Any

import pytest

from cwdpo_bench.train.sections import Dynamics
from cwdpo_bench.train.stopping import best_step, stop_reason


def _rows(deltas: list[float], argmax: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            "step": 10 * i,
            "delta_chosen": delta,
            "chosen_mean_logp": -0.5 + delta / 10,
            "rejected_mean_logp": -4 - i,
            "argmax_mean_logp": -0.3 + argmax * i,
            "chosen_change_error": 0.001,
        }
        for i, delta in enumerate(deltas)
    ]


def test_the_best_measurement_has_the_highest_change_of_the_chosen() -> None:
    assert best_step(_rows([0, 0.5, 1.0, 0.2])) == 20
    assert best_step(_rows([0, -0.5, -1.0])) == 0
    assert best_step(_rows([0, 1.0, 1.0])) == 10


@pytest.mark.parametrize(
    ("deltas", "stops"),
    [
        ([0, 1, 2, 3, 4], False),
        ([0, 1, 0.5, 0.4], False),
        ([0, 1, 0.5, 0.4, 0.3], True),
        ([0, 1, 0.5, 0.4, 1.1], False),
        ([0, -1, -2, -3], True),
    ],
)
def test_delta_logp_stops_after_patience_without_a_best(deltas: list[float], stops: bool) -> None:
    settings = Dynamics(stop_on=["delta_logp"], patience=3)
    reason = stop_reason(_rows(deltas), settings, pushes_down=True)
    assert (reason is not None) == stops


def test_squeezing_stops_and_is_told_in_its_own_words() -> None:
    rows = _rows([0, -2, -4, -5], argmax=0.05)
    settings = Dynamics(stop_on=["squeezing"])
    reason = stop_reason(rows, settings, pushes_down=True)
    assert reason is not None
    assert reason.startswith("squeezing: at steps 10 to 30")
    assert stop_reason(rows, settings, pushes_down=False) is None
    assert stop_reason(_rows([0, -2, -4, -5], argmax=-0.05), settings, pushes_down=True) is None


def test_nothing_stops_where_nothing_is_asked_for() -> None:
    assert stop_reason(_rows([0, -2, -4, -5], 0.05), Dynamics(), pushes_down=True) is None
