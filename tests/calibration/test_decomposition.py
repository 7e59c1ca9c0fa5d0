"""The parts of the Brier score against loops over the formula, and their laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from cwdpo_bench.calibration import (
    brier,
    brier_decomposition,
    class_statistics,
    ece_classwise,
    ece_classwise_from_sums,
    reliability_part,
    resolution_part,
    uncertainty_part,
)


def drawn(seed, size=300, classes=4):
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.ones(classes), size), generator.integers(0, classes, size)


def test_parts_are_murphys_written_as_loops():
    probabilities, labels = drawn(0)
    reliability = resolution = uncertainty = 0.0
    for k in range(4):
        p, o = probabilities[:, k], (labels == k).astype(float)
        uncertainty += o.mean() * (1 - o.mean())
        for low, high in zip(np.arange(10) / 10, np.arange(1, 11) / 10, strict=True):
            inside = (p > low) & (p <= high)
            if inside.any():
                share = inside.mean()
                reliability += share * (p[inside].mean() - o[inside].mean()) ** 2
                resolution += share * (o[inside].mean() - o.mean()) ** 2
    parts = brier_decomposition(probabilities, labels, bins=10)
    assert parts[:3] == pytest.approx((reliability, resolution, uncertainty), abs=1e-12)


def test_terms_within_the_bins_are_those_of_stephenson():
    probabilities, labels = drawn(1)
    within = 0.0
    for k in range(4):
        p, o = probabilities[:, k], (labels == k).astype(float)
        index = np.ceil(p * 15).clip(1)
        for b in set(index):
            inside = index == b
            p_off, o_off = p[inside] - p[inside].mean(), o[inside] - o[inside].mean()
            within += (p_off**2 - 2 * p_off * o_off).sum() / len(p)
    assert brier_decomposition(probabilities, labels).within == pytest.approx(within, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(2, 6), st.integers(1, 20))
def test_parts_add_up_to_the_score_and_keep_their_bounds(seed, size, classes, bins):
    probabilities, labels = drawn(seed, size, classes)
    parts = brier_decomposition(probabilities, labels, bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
    assert total == pytest.approx(brier(probabilities, labels), abs=1e-12)
    assert total == pytest.approx(
        brier_score_loss(labels, probabilities, labels=range(classes), scale_by_half=False)
    )
    assert 0 <= parts.reliability <= 2
    assert -1e-12 <= parts.resolution <= parts.uncertainty + 1e-12
    assert 0 <= parts.uncertainty <= 1 - 1 / classes + 1e-12
    order = np.random.default_rng(seed).permutation(size)
    again = brier_decomposition(probabilities[order], labels[order], bins)
    assert again == pytest.approx(parts, abs=1e-12)


def test_a_calibrated_forecast_has_no_reliability_term_in_the_limit():
    generator = np.random.default_rng(2)
    rows = np.array([[0.7, 0.2, 0.1], [0.15, 0.8, 0.05]])[generator.integers(0, 2, 200_000)]
    labels = (generator.random((200_000, 1)) > np.cumsum(rows, axis=1)).sum(axis=1)
    parts = brier_decomposition(rows, labels)
    assert parts.reliability < 1e-4
    assert parts.within == pytest.approx(0, abs=1e-12)
    # The two forecasts' half differences, squared and added.
    assert parts.resolution == pytest.approx(0.275**2 + 0.3**2 + 0.025**2, abs=0.003)


def test_a_forecast_that_is_always_the_same_has_no_resolution():
    _, labels = drawn(3)
    parts = brier_decomposition(np.tile([0.25] * 4, (300, 1)), labels)
    assert parts.resolution == pytest.approx(0, abs=1e-12)


def test_options_that_a_question_lacks_are_no_predictions_of_it():
    three, labels = drawn(4, 200, 3)
    four, more = drawn(5, 100, 4)
    probabilities = np.concatenate([np.column_stack([three, np.zeros(200)]), four])
    truth = np.concatenate([labels, more])
    offered = np.concatenate([np.tile([1, 1, 1, 0], (200, 1)), np.ones((100, 4))])
    sums = class_statistics(probabilities, truth, offered).sum(axis=0)
    fourth = class_statistics(four, more).sum(axis=0)[-45:]
    assert sums[-45:] == pytest.approx(fourth)
    known = [float(ece_classwise_from_sums(block)) for block in np.split(sums, 4)]
    assert float(ece_classwise_from_sums(sums)) == pytest.approx(np.mean(known))
    parts = reliability_part(sums), -resolution_part(sums), uncertainty_part(sums)
    whole = brier(probabilities, truth)
    assert sum(parts) == pytest.approx(whole, abs=0.02)


def test_a_class_without_rows_does_not_count():
    probabilities, labels = drawn(6, 100, 3)
    padded = np.column_stack([probabilities, np.zeros(100)])
    offered = np.tile([1, 1, 1, 0], (100, 1))
    sums = class_statistics(padded, labels, offered).sum(axis=0)
    assert float(ece_classwise_from_sums(sums)) == pytest.approx(
        ece_classwise(probabilities, labels)
    )
    for part in (ece_classwise_from_sums, reliability_part, resolution_part, uncertainty_part):
        assert np.isnan(part(np.zeros(90)))


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="offered"):
        class_statistics([[0.5, 0.5]], [0], [[1]])
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        class_statistics([0.5, 0.5], [0])
    with pytest.raises(ValueError, match="classes"):
        ece_classwise_from_sums(np.zeros(44))
