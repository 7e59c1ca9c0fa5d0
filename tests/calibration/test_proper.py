import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss

from cwdpo_bench.calibration import brier, entropy, nll


@pytest.fixture
def random_rows():
    generator = np.random.default_rng(0)
    return generator.dirichlet(np.ones(5), 200), generator.integers(0, 5, 200)


def test_nll_equals_sklearn_and_torch(random_rows):
    probabilities, labels = random_rows
    assert nll(probabilities, labels) == pytest.approx(log_loss(labels, probabilities))
    expected = torch.nn.functional.nll_loss(
        torch.tensor(probabilities).log(), torch.tensor(labels)
    ).item()
    assert nll(probabilities, labels) == pytest.approx(expected)


def test_brier_equals_sklearn_over_all_classes(random_rows):
    probabilities, labels = random_rows
    expected = brier_score_loss(labels, probabilities, scale_by_half=False)
    assert brier(probabilities, labels) == pytest.approx(expected)


def test_brier_of_two_classes_is_twice_the_one_sided_score():
    generator = np.random.default_rng(1)
    p = generator.random(100)
    labels = generator.integers(0, 2, 100)
    probabilities = np.column_stack([1 - p, p])
    assert brier(probabilities, labels) == pytest.approx(2 * brier_score_loss(labels, p))


def test_entropy_equals_scipy_and_reaches_its_bounds(random_rows):
    probabilities, _ = random_rows
    assert entropy(probabilities) == pytest.approx(scipy.stats.entropy(probabilities, axis=1))
    assert entropy([0.0, 1.0, 0.0]) == 0.0
    assert entropy([0.25] * 4) == pytest.approx(np.log(4))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**31))
def test_scores_are_bounded_and_independent_of_the_order(classes, seed):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(classes), 20)
    labels = generator.integers(0, classes, 20)
    order = generator.permutation(20)
    assert 0 <= brier(probabilities, labels) <= 2
    assert nll(probabilities, labels) >= 0
    assert brier(probabilities[order], labels[order]) == pytest.approx(brier(probabilities, labels))
    relabel = generator.permutation(classes)
    renamed = np.argsort(relabel)[labels]
    assert nll(probabilities[:, relabel], renamed) == pytest.approx(nll(probabilities, labels))


def test_the_true_probabilities_have_the_best_expected_scores():
    generator = np.random.default_rng(2)
    truth = np.tile([0.7, 0.2, 0.1], (20_000, 1))
    labels = generator.choice(3, 20_000, p=truth[0])
    other = np.tile([0.5, 0.3, 0.2], (20_000, 1))
    assert brier(truth, labels) < brier(other, labels)
    assert nll(truth, labels) < nll(other, labels)


@pytest.mark.parametrize("score", [brier, nll])
@pytest.mark.parametrize(
    ("probabilities", "labels", "words"),
    [
        ([[0.5, np.nan]], [0], "NaN"),
        ([[0.5, 0.6]], [0], "sum to 1"),
        ([[1.5, -0.5]], [0], r"\[0, 1\]"),
        ([[0.5, 0.5]], [2], r"\[0, 2\)"),
        ([[0.5, 0.5]], [-1], r"\[0, 2\)"),
        ([[0.5, 0.5]], [0.5], "whole"),
        ([[0.5, 0.5]], [0, 1], "one a row"),
        ([0.5, 0.5], [0, 1], r"\[N, K\]"),
    ],
)
def test_bad_probabilities_are_refused(score, probabilities, labels, words):
    with pytest.raises(ValueError, match=words):
        score(probabilities, labels)


def test_an_infinite_nll_is_refused_with_its_sample():
    with pytest.raises(ValueError, match="sample 1"):
        nll([[0.5, 0.5], [0.0, 1.0]], [0, 0])
