import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cwdpo_bench.calibration import aurc, aurc_from_sums, auroc


def aurc_by_definition(confidences, correct):
    order = np.argsort(-np.asarray(confidences), kind="stable")
    wrong = 1.0 - np.asarray(correct, dtype=float)[order]
    return float(np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1)))


def test_aurc_without_ties_is_the_mean_risk_over_coverages():
    generator = np.random.default_rng(0)
    confidences, correct = generator.random(200), generator.integers(0, 2, 200)
    assert aurc(confidences, correct) == pytest.approx(aurc_by_definition(confidences, correct))


def test_aurc_with_ties_is_the_mean_over_all_orders_of_the_tied():
    confidences, correct = [0.9, 0.5, 0.5, 0.5, 0.1], [1, 0, 1, 0, 1]
    orders = [
        aurc_by_definition(confidences, [1, *middle, 1])
        for middle in itertools.permutations([0, 1, 0])
    ]
    assert aurc(confidences, correct) == pytest.approx(np.mean(orders))


def test_aurc_of_a_resample_follows_from_its_sums():
    # Levels 0..9 of falling confidence; a resample leaves some of them empty.
    generator = np.random.default_rng(1)
    levels, correct = generator.integers(0, 10, 80), generator.integers(0, 2, 80)
    drawn = generator.integers(0, 80, 12)
    rows = np.zeros((80, 20))
    rows[np.arange(80), levels] = 1
    rows[np.arange(80), 10 + levels] = 1 - correct
    expected = [aurc(1 - levels / 10, correct), aurc(1 - levels[drawn] / 10, correct[drawn])]
    assert aurc_from_sums([rows.sum(0), rows[drawn].sum(0)]) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.6, 1.0]), st.booleans()), min_size=1))
def test_aurc_is_bounded_and_independent_of_the_order(rows):
    confidences, correct = zip(*rows, strict=True)
    assert -1e-12 <= aurc(confidences, correct) <= 1 + 1e-12
    assert aurc(confidences[::-1], correct[::-1]) == pytest.approx(aurc(confidences, correct))


def test_aurc_rewards_confidence_in_the_right_answers():
    assert aurc([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]) < aurc([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0])
    assert aurc([0.3, 0.4], [1, 1]) == 0.0
    assert aurc([0.3, 0.4], [0, 0]) == pytest.approx(1.0)


@pytest.mark.parametrize("levels", [5, 1000])
def test_auroc_equals_sklearn(levels):
    generator = np.random.default_rng(2)
    confidences, correct = (
        generator.integers(0, levels, 300) / levels,
        generator.integers(0, 2, 300),
    )
    assert auroc(confidences, correct) == pytest.approx(roc_auc_score(correct, confidences))


def test_auroc_without_both_kinds_is_refused():
    with pytest.raises(ValueError, match="both right and wrong"):
        auroc([0.1, 0.9], [1, 1])


@pytest.mark.parametrize("score", [aurc, auroc])
def test_bad_answers_are_refused(score):
    with pytest.raises(ValueError, match="NaN"):
        score([np.nan, 0.5], [1, 0])
    with pytest.raises(ValueError, match="agree"):
        score([0.4, 0.5], [1])
