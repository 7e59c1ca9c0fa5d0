import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from netcal.metrics import ECE, MCE
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error

from cwdpo_bench.calibration import (
    bin_statistics,
    ece,
    ece_adaptive,
    ece_classwise,
    ece_debiased,
    ece_from_sums,
    equal_mass_index,
    equal_width_index,
    mce,
    reliability,
)

ERRORS = [ece, ece_adaptive, ece_debiased, mce]


def random_answers(seed, size=400):
    generator = np.random.default_rng(seed)
    confidences = generator.beta(3, 2, size)
    return confidences, (generator.random(size) < confidences**1.5).astype(int)


answers = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0]), st.booleans()),
    min_size=1,
    max_size=40,
).map(lambda rows: (np.array([c for c, _ in rows]), np.array([y for _, y in rows])))


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("seed", range(3))
def test_ece_and_mce_equal_torchmetrics(seed, bins):
    confidences, correct = random_answers(seed)
    tensors = torch.tensor(confidences), torch.tensor(correct)
    expected = binary_calibration_error(*tensors, n_bins=bins, norm="l1")
    assert ece(confidences, correct, bins) == pytest.approx(expected.item(), abs=1e-12)
    expected = binary_calibration_error(*tensors, n_bins=bins, norm="max")
    assert mce(confidences, correct, bins) == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ece_and_mce_equal_netcal(seed):
    confidences, correct = random_answers(seed)
    assert ece(confidences, correct) == pytest.approx(ECE(15).measure(confidences, correct))
    assert mce(confidences, correct) == pytest.approx(MCE(15).measure(confidences, correct))


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_ece_equals_netcal_with_equal_mass(seed):
    # 1 + a multiple of the bins: netcal's interpolated quantiles then fall on samples, as ours do.
    confidences, correct = random_answers(seed, size=3001)
    expected = ECE(15, equal_intervals=False).measure(confidences, correct)
    assert ece_adaptive(confidences, correct) == pytest.approx(expected, abs=1e-9)


def test_adaptive_ece_is_the_mean_gap_of_equally_large_slices():
    confidences, correct = random_answers(3, size=300)
    order = np.argsort(confidences)
    slices = np.split(order, 15)
    expected = np.mean([abs(correct[s].mean() - confidences[s].mean()) for s in slices])
    assert ece_adaptive(confidences, correct) == pytest.approx(expected)


def test_debiased_error_equals_the_formula_of_kumar_written_as_a_loop():
    confidences, correct = random_answers(4, size=300)
    total = 0.0
    for rows in np.split(np.argsort(confidences), 15):
        accuracy, gap = correct[rows].mean(), (correct[rows] - confidences[rows]).mean()
        total += (gap**2 - accuracy * (1 - accuracy) / (len(rows) - 1)) / 15
    assert ece_debiased(confidences, correct) == pytest.approx(np.sqrt(max(total, 0)))


def test_debiasing_removes_the_bias_that_plain_ece_shows_on_calibrated_answers():
    generator = np.random.default_rng(0)
    plain, debiased = [], []
    for _ in range(200):
        confidences = generator.random(150)
        correct = generator.random(150) < confidences
        plain.append(ece_adaptive(confidences, correct) ** 2)
        debiased.append(ece_debiased(confidences, correct) ** 2)
    assert np.mean(debiased) < 0.4 * np.mean(plain)


def test_ece_of_calibrated_answers_vanishes_with_their_number():
    generator = np.random.default_rng(1)
    confidences = generator.random(400_000)
    correct = generator.random(400_000) < confidences
    assert ece(confidences, correct) < 0.005
    assert ece_adaptive(confidences, correct) < 0.005
    assert mce(confidences, correct) < 0.015


def test_ece_of_constant_overconfidence_is_the_overconfidence():
    assert ece([0.9] * 10, [1] * 6 + [0] * 4) == pytest.approx(0.3)
    assert mce([0.9] * 10, [1] * 6 + [0] * 4) == pytest.approx(0.3)


def test_classwise_ece_is_the_mean_of_torchmetrics_over_classes():
    generator = np.random.default_rng(5)
    probabilities = generator.dirichlet(np.ones(4), 300)
    labels = generator.integers(0, 4, 300)
    expected = np.mean(
        [
            binary_calibration_error(
                torch.tensor(probabilities[:, k]), torch.tensor(labels == k).int(), n_bins=15
            ).item()
            for k in range(4)
        ]
    )
    assert ece_classwise(probabilities, labels) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(answers, st.integers(1, 20))
def test_errors_are_bounded_and_ordered(rows, bins):
    for error in ERRORS:
        assert 0.0 <= error(*rows, bins) <= 1.0
    assert ece(*rows, bins) <= mce(*rows, bins) + 1e-12


@settings(max_examples=60, deadline=None)
@given(answers, st.randoms(use_true_random=False))
def test_errors_do_not_depend_on_the_order_of_the_answers(rows, random):
    order = list(range(len(rows[0])))
    random.shuffle(order)
    for error in ERRORS:
        assert error(rows[0][order], rows[1][order]) == pytest.approx(error(*rows), abs=1e-12)


def test_bins_are_closed_above_as_in_guo():
    assert equal_width_index([0.0, 0.1, 0.2, 0.20001, 1.0], 5).tolist() == [0, 0, 0, 1, 4]


def test_equal_mass_bins_hold_equal_numbers_and_keep_ties_together():
    confidences = np.random.default_rng(0).random(150)
    assert np.bincount(equal_mass_index(confidences, 15)).tolist() == [10] * 15
    assert len(set(equal_mass_index([0.5] * 30, 15))) == 1
    assert equal_mass_index([0.2, 0.7], 15).tolist()[0] < equal_mass_index([0.2, 0.7], 15)[1]


def test_ece_from_resampled_sums_is_the_ece_of_the_resample():
    confidences, correct = random_answers(6)
    drawn = np.random.default_rng(0).integers(0, 400, 400)
    statistics = bin_statistics(confidences, correct, equal_width_index(confidences))
    both = np.stack([statistics.sum(0), statistics[drawn].sum(0)])
    expected = [ece(confidences, correct), ece(confidences[drawn], correct[drawn])]
    assert ece_from_sums(both) == pytest.approx(expected)


def test_ece_of_no_answers_at_all_is_undefined():
    assert np.isnan(ece_from_sums(np.zeros(45)))


def test_reliability_bins_equal_sklearn():
    confidences, correct = random_answers(2)
    bins = reliability(confidences, correct, 10)
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=10)
    filled = bins.counts > 0
    assert bins.counts.sum() == 400
    assert bins.accuracy[filled] == pytest.approx(accuracy)
    assert bins.confidence[filled] == pytest.approx(confidence)
    assert np.isnan(bins.accuracy[~filled]).all()


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("confidences", "correct", "words"),
    [
        ([0.5, np.nan], [1, 0], "NaN"),
        ([0.5, 1.2], [1, 0], r"\[0, 1\]"),
        ([-0.1, 0.5], [1, 0], r"\[0, 1\]"),
        ([0.5, 0.5], [1], "agree"),
        ([[0.5]], [1], "dimension"),
        ([], [], "empty"),
        ([0.5], [2], "0 and 1"),
        ([0.5], [0.5], "0 and 1"),
    ],
)
def test_bad_answers_are_refused(error, confidences, correct, words):
    with pytest.raises(ValueError, match=words):
        error(confidences, correct)


def test_no_bins_are_refused():
    with pytest.raises(ValueError, match="bins"):
        ece([0.5], [1], 0)
