import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from cwdpo_bench.leaderboards.significance import (
    detectable,
    holm,
    mcnemar_exact,
    samples_needed,
    standardised,
    wilson_interval,
)


def test_holm_equals_the_example_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made non-decreasing.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_laws_of_holm(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, p * len(p_values)) + 1e-12
    assert holm(p_values[::-1]) == adjusted[::-1]
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_equals_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)


@settings(max_examples=60)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_statsmodels(first, second):
    oracle = mcnemar([[5, first], [second, 7]], exact=True).pvalue
    assert mcnemar_exact(first, second) == pytest.approx(min(1.0, oracle), abs=1e-12)


def test_mcnemar_without_discordant_questions_says_nothing():
    assert mcnemar_exact(0, 0) == 1.0


@settings(max_examples=60)
@given(st.integers(1, 500), st.data(), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_equals_statsmodels(count, data, level):
    hits = data.draw(st.integers(0, count))
    oracle = proportion_confint(hits, count, alpha=1 - level, method="wilson")
    assert wilson_interval(hits, count, level) == pytest.approx(oracle, abs=1e-12)


def test_wilson_is_no_point_at_the_ends():
    low, high = wilson_interval(0, 900)
    assert low == 0.0
    assert 0.003 < high < 0.005
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(3, 2)


def test_the_detectable_difference_is_that_of_a_paired_t_test():
    for size in (100, 1000):
        oracle = TTestPower().solve_power(None, nobs=size, alpha=0.05, power=0.8)
        assert detectable(1 / np.sqrt(size), 0.05) == pytest.approx(oracle, rel=0.02)
        oracle = TTestPower().solve_power(
            None, nobs=size, alpha=0.05, power=0.8, alternative="larger"
        )
        assert detectable(1 / np.sqrt(size), 0.05, sided=1) == pytest.approx(oracle, rel=0.02)


def test_samples_needed_bring_the_detectable_difference_to_what_is_wanted():
    spread, clusters = 0.7, 50
    now = detectable(spread / np.sqrt(clusters), 0.05)
    needed = samples_needed(clusters, now, 0.05)
    assert detectable(spread / np.sqrt(needed), 0.05) <= 0.05
    assert detectable(spread / np.sqrt(needed - 1), 0.05) > 0.05
    assert samples_needed(clusters, now, 10.0) == clusters
    with pytest.raises(ValueError, match="positive"):
        samples_needed(clusters, now, 0.0)


def test_a_difference_without_variance_has_no_standardised_size():
    assert standardised(1.0, 0.0, 10) is None
    assert standardised(1.0, 0.1, 100) == 1.0
