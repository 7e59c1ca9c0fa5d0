"""The gate over the seeds of a system: means, their spread, and the level that it promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cwdpo_bench.leaderboards.gate import _judged, _plan, run_gate
from cwdpo_bench.leaderboards.judging import _as_students
from cwdpo_bench.leaderboards.policy import Policy, policy_of
from cwdpo_bench.leaderboards.sides import Side
from cwdpo_bench.leaderboards.statistics import TaskStatistics

RULES = policy_of({"rules": [{"metric": "CIDEr", "max_drop": 0, "detect": 50}]}, "test")


@pytest.fixture
def seeds(make: Any, tmp_path: Path) -> Any:
    """Write the runs of a system: the same captions, each seed's CIDEr shifted as a whole."""
    samples = make.captions(0.5, size=100)

    def write(name: str, *shifts: float) -> list[Path]:
        return [
            make.save(
                tmp_path / f"{name}-{k}",
                name,
                {"coco": make.task(samples.assign(CIDEr=samples["CIDEr"] + shift))},
            )
            for k, shift in enumerate(shifts)
        ]

    return write


def test_a_system_is_judged_by_the_mean_over_its_seeds(seeds: Any) -> None:
    base = seeds("base", 0.01, -0.01, 0.0)
    worse = seeds("worse", -0.49, -0.51, -0.5)
    result = run_gate(worse, base, RULES)
    (check,) = result.checks
    assert result.verdict == "regression"
    assert check.difference == pytest.approx(-0.5)
    assert run_gate(base, worse, RULES).verdict == "pass"
    assert "seeds (worse: 3, base: 3)" in result.notes[0]
    # The same in the form of the command line, where the name is the user's.
    named = run_gate(f"w={','.join(map(str, worse))}", f"b={','.join(map(str, base))}", RULES)
    assert (named.candidate, named.checks) == ("w", result.checks)


def test_seeds_that_disagree_show_less_than_one_run_would(seeds: Any) -> None:
    base, one = seeds("base", 0.0), seeds("one", -0.05)
    assert run_gate(one[0], base[0], RULES).verdict == "regression"
    # The same mean, from seeds that lie far apart: all samples agree, the seeds do not.
    spread = seeds("spread", -0.45, 0.0, 0.3)
    (check,) = run_gate(spread, base, RULES).checks
    assert check.difference == pytest.approx(-0.05)
    assert check.verdict == "inconclusive"
    low, high = check.interval
    assert low < -0.5 < 0.4 < high
    # The standard error of three such seeds is .218; t's 5 % bound is 1.775 times the normal one.
    able = re.search(r"can show a change of ([\d.]+)", check.reason)
    assert able is not None
    assert float(able[1]) == pytest.approx(100 * 0.218 * 1.775 * 2.486, rel=0.05)


def test_the_same_seeds_against_themselves_pass(seeds: Any) -> None:
    runs = seeds("same", 0.0, 0.0)
    assert run_gate(runs, runs[:1], RULES).checks[0].reason.startswith("the same answers")


def test_a_mistake_is_no_verdict(seeds: Any, make: Any, tmp_path: Path) -> None:
    base = seeds("base", 0.0, 0.1)
    assert "given twice" in (run_gate([base[0], base[0]], base, RULES).error or "")
    other = make.save(tmp_path / "mmmu", "x", {"mmmu": make.task(make.choices(), "mmmu")})
    told = run_gate([base[0], other], base, RULES).error or ""
    assert "was not run by every seed" in told
    prompt = make.save(
        tmp_path / "prompt", "x", {"coco": make.task(make.captions(0.5, size=100), prompt="else")}
    )
    (check,) = run_gate([base[0], prompt], base, RULES).checks
    assert check.verdict == "not judged"
    assert "did not do the same task" in check.reason
    few = make.save(tmp_path / "few", "x", {"coco": make.task(make.captions(0.5, size=90))})
    # A floor has no baseline: the seeds must be of the same samples among themselves.
    floor = policy_of({"rules": [{"metric": "CIDEr", "task": "coco", "min_value": 1}]}, "test")
    (check,) = run_gate([base[0], few], base, floor).checks
    assert "hold different samples" in check.reason


def test_students_tails_keep_order_mean_and_place() -> None:
    normal = np.random.default_rng(0).normal(3, 2, 200_000)
    wide = _as_students(normal, 3, normal.std(), 2)
    assert (np.argsort(wide) == np.argsort(normal)).all()
    for share in (0.01, 0.05, 0.5, 0.95, 0.99):
        expected = 3 + normal.std() * stats.t.ppf(share, 2)
        assert np.quantile(wide, share) == pytest.approx(expected, abs=0.25)
    assert _as_students(np.zeros(5), 0, 0, 2).tolist() == [0] * 5


def _alarms(seeds: int, rules: Policy, trials: int) -> float:
    """The share of gates that call a system a regression which is as good as the baseline."""
    generator, size = np.random.default_rng(3), 60
    ids = np.array([str(i) for i in range(size)])

    def side(name: str) -> Side:
        runs = [
            TaskStatistics(
                ids,
                ids,
                ((),) * size,
                np.ones(size, bool),
                {},
                {"CIDEr": np.column_stack([generator.normal(1 + shift, 0.1, size), np.ones(size)])},
            )
            for shift in generator.normal(0, 0.2, seeds)
        ]
        return Side(name, {"coco": tuple(runs)}, {"coco": ("",) * seeds})

    gates = [list(_judged(list(_plan(rules, side("a"), side("b"))), rules)) for _ in range(trials)]
    return sum(checks[0].verdict == "regression" for checks in gates) / trials


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_false_alarms_are_as_rare_as_the_level_says_with_few_seeds_too(seeds: int) -> None:
    """Nearly all the spread is the seeds'; without Student's tails 14, 8 and 6 in 100 alarm."""
    assert _alarms(seeds, RULES, 200) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
