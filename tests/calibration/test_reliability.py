"""Bands of the reliability diagram, figures with intervals, curves of risk and coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from cwdpo_bench.calibration import (
    aurc,
    auroc,
    auroc_from_sums,
    bin_statistics,
    bootstrap_estimate,
    cross_fit_temperature,
    ece,
    ece_from_sums,
    equal_width_index,
    fit_temperature,
    reliability,
    risk_coverage,
)
from cwdpo_bench.calibration.plots import reliability_diagram


def answers(seed, size=400):
    generator = np.random.default_rng(seed)
    confidences = np.round(generator.beta(3, 2, size), 2)
    return confidences, (generator.random(size) < confidences).astype(int)


def test_bands_are_scipys_exact_binomial_ones():
    bins = reliability(*answers(0), 10)
    for count, accuracy, low, high in zip(
        bins.counts, bins.accuracy, bins.low, bins.high, strict=True
    ):
        if count == 0:
            assert np.isnan(low)
            continue
        exact = binomtest(round(accuracy * count), int(count)).proportion_ci(0.95, "exact")
        assert (low, high) == pytest.approx((exact.low, exact.high))


def test_bands_of_clusters_are_wider_where_an_image_repeats_its_answer():
    confidences, correct = answers(1, 60)
    repeated = np.repeat(confidences, 10), np.repeat(correct, 10)
    clusters = np.repeat(np.arange(60), 10)
    alone, drawn = reliability(*repeated, 5), reliability(*repeated, 5, clusters)
    filled = alone.counts >= 50
    assert filled.any()
    assert ((drawn.high - drawn.low) > 1.5 * (alone.high - alone.low))[filled].all()
    assert (drawn.low <= drawn.accuracy + 1e-12)[filled].all()
    assert (drawn.high >= drawn.accuracy - 1e-12)[filled].all()


def test_a_band_of_clusters_covers_as_often_as_it_says():
    covered = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        clusters = np.repeat(np.arange(80), 4)
        correct = np.repeat(generator.random(80) < 0.6, 4)
        bins = reliability(np.full(320, 0.6), correct, 5, clusters)
        covered.append(bins.low[2] <= 0.6 <= bins.high[2])
    assert np.mean(covered) > 0.8


def test_the_diagram_draws_the_bands():
    bins = reliability([0.1, 0.9, 0.95, 0.99], [0, 1, 1, 0], bins=2)
    upper, _ = reliability_diagram(bins).axes
    (bars,) = [c for c in upper.containers if type(c).__name__ == "ErrorbarContainer"]
    segments = bars.lines[2][0].get_segments()
    assert [list(segment[:, 1]) for segment in segments] == [
        pytest.approx([bins.low[b], bins.high[b]]) for b in (0, 1)
    ]


def test_an_estimate_is_the_figure_with_its_textbook_error():
    correct = np.random.default_rng(2).random(500) < 0.7
    rows = np.column_stack([correct, np.ones(500)])
    found = bootstrap_estimate(rows, lambda sums: sums[..., 0] / sums[..., 1])
    assert found.value == correct.mean()
    assert found.stderr == pytest.approx(correct.std() / np.sqrt(500), rel=0.1)
    assert found.low < found.value < found.high


def test_clusters_widen_an_estimate_of_repeated_answers():
    confidences, correct = answers(3, 100)
    rows = bin_statistics(confidences, correct, equal_width_index(confidences))
    alone = bootstrap_estimate(np.repeat(rows, 5, axis=0), ece_from_sums)
    drawn = bootstrap_estimate(np.repeat(rows, 5, axis=0), ece_from_sums, np.repeat(range(100), 5))
    assert alone.value == pytest.approx(ece(confidences, correct))
    assert drawn.value == pytest.approx(alone.value)
    assert drawn.stderr > 1.5 * alone.stderr


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 60))
def test_auroc_of_sums_is_sklearns(seed, size):
    confidences, correct = answers(seed, size)
    _, level = np.unique(-confidences, return_inverse=True)
    sums = np.concatenate([np.bincount(level), np.bincount(level, weights=1.0 - correct)])
    if len(set(correct)) < 2:
        assert np.isnan(auroc_from_sums(sums))
    else:
        expected = roc_auc_score(correct, confidences)
        assert float(auroc_from_sums(sums)) == pytest.approx(expected)
        assert auroc(confidences, correct) == pytest.approx(expected)


def test_the_curve_ends_at_everything_and_its_mean_risk_is_aurc():
    generator = np.random.default_rng(4)
    confidences = generator.permutation(200) / 200
    correct = generator.random(200) < confidences
    curve = risk_coverage(confidences, correct)
    assert curve.coverage[-1] == 1.0
    assert curve.risk[-1] == pytest.approx(1 - correct.mean())
    assert (np.diff(curve.threshold) < 0).all()
    assert curve.risk.mean() == pytest.approx(aurc(confidences, correct))
    kept = confidences >= curve.threshold[49]
    assert kept.mean() == curve.coverage[49]
    assert curve.risk[49] == pytest.approx(1 - correct[kept].mean())


def test_answers_of_one_confidence_are_one_point():
    curve = risk_coverage([0.5, 0.9, 0.5], [1, 1, 0])
    assert curve.coverage.tolist() == [1 / 3, 1.0]
    assert curve.risk.tolist() == pytest.approx([0.0, 1 / 3])


def test_each_half_is_scaled_by_the_temperature_of_the_other():
    generator = np.random.default_rng(5)
    scores, labels = 3 * generator.normal(size=(200, 4)), generator.integers(0, 4, 200)
    clusters = np.repeat([f"image {n}" for n in range(50)], 4)
    found = cross_fit_temperature(scores, labels, clusters)
    values = np.unique(found)
    assert len(values) == 2
    for value in values:
        own = found == value
        assert not set(clusters[own]) & set(clusters[~own])
        assert value == pytest.approx(fit_temperature(scores[~own], labels[~own]))
    # It does not see its own labels, and does not depend on the order of the rows.
    changed = labels.copy()
    changed[found == values[0]] = 0
    assert (cross_fit_temperature(scores, changed, clusters)[found == values[0]] == values[0]).all()
    order = generator.permutation(200)
    again = cross_fit_temperature(scores[order], labels[order], clusters[order])
    assert again == pytest.approx(found[order])


def test_one_cluster_cannot_be_held_out():
    with pytest.raises(ValueError, match="two clusters"):
        cross_fit_temperature(np.zeros((2, 2)), [0, 1], ["a", "a"])
